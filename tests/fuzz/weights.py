"""Damaged weights: headers of safetensors files, indices of shards, files of torch."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.checkpoints.torch_files import read_torch_file
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, JSON, TEXT, Mutation, mutated
from tests.fuzz.odd_files import ODD, put_odd_file
from tests.fuzz.values import nasty

KIND = "weights"

#: One seed in so many merges, where the weights can be opened.
MERGED = 12
_INDEX = "model.safetensors.index.json"
#: Names of tensors that readers have stumbled over.
_NAMES = (
    *("", "a" * 5_000, "a." * 450, "x" * 200_000, "layers." * 140, "1" * 999),
    *("\x1b[2J", "\u202e", "²", "٣.weight", "\ud800", "model.layers.²", "model.layers.1e9"),
    *("../x", "a:b", "__metadata__"),
)
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def prepare(folder: Path) -> None:
    """Make a model in one file, the same in shards, and files of torch in both formats."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "expert"):
        tensors = _tensors(generator)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(_CONFIG))
    shutil.copytree(folder / "expert", folder / "shards")
    whole = open_checkpoint(str(folder / "expert"))
    (folder / "shards" / "model.safetensors").unlink()
    placed = lay_out_files(folder / "shards", whole.tensors, shard_bytes=1500)
    for name, info in placed.items():
        write_tensor(info, whole.read(name))
    torch.save(tensors, folder / "archive.pt")
    torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)


def _tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": normal(12, 8).bfloat16(),
        "lm_head.weight": normal(12, 8),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = normal(8, 8)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(16, 8).half()
        tensors[f"{prefix}.input_layernorm.weight"] = normal(8)
    tensors["empty"] = torch.empty(0, 3)
    tensors["steps"] = torch.arange(5)
    return tensors


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a weight file or an index, and open it, read from it or merge it.

    Raises:
        Finding: If a promise does not hold, or what the safetensors library refuses is accepted.
    """
    draw = Random(seed)
    kind = draw.choice(("file", "file", "file", "shard", "index", "archive", "pickle", "legacy"))
    if kind in ("archive", "pickle", "legacy"):
        _check_torch(prepared, scratch, kind, draw)
        return
    model = scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(prepared / ("expert" if kind == "file" else "shards"), model)
    files = sorted(model.glob("*.safetensors"))
    damaged = model / _INDEX if kind == "index" else draw.choice(files)
    change = _damaged_index if kind == "index" else _damaged_weights
    damaged.write_bytes(change(damaged.read_bytes(), draw))
    if not draw.randrange(ODD):
        put_odd_file(damaged, draw)
    opened = read_or_refuse(partial(open_checkpoint, str(model)))
    if opened is not None:
        _check_opened(opened, model)
    if not draw.randrange(MERGED):
        _merge(prepared, model, scratch)


def _damaged_index(data: bytes, draw: Random) -> bytes:
    if draw.random() < 0.5:
        return mutated(data, draw, JSON, TEXT, ANY)
    index = json.loads(data)
    places: dict[str, Any] = index["weight_map"]
    name = draw.choice([*places])
    places[name] = draw.choice(
        ("../x.safetensors", "/etc/passwd", "..", "", "a" * 300, nasty(draw))
    )
    return json.dumps(index).encode()


def _damaged_weights(data: bytes, draw: Random) -> bytes:
    """Damage any byte, or the header with a length that fits it."""
    if draw.random() < 0.2:
        return mutated(data, draw, ANY)
    size = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + size]
    header = draw.choice([*HEADERS.values(), _any_header, _any_header])(text, draw)
    weights = data[8 + size :]
    return struct.pack("<Q", len(header)) + header + weights


def _any_header(text: bytes, draw: Random) -> bytes:
    return mutated(text, draw, JSON, JSON, TEXT, ANY)


def _entries(text: bytes) -> tuple[dict[str, Any], list[str]]:
    header = json.loads(text)
    return header, [name for name in header if name != "__metadata__"]


def shift_offsets(text: bytes, draw: Random) -> bytes:
    """Move one or both ends of a tensor's bytes."""
    header, names = _entries(text)
    offsets = header[draw.choice(names)]["data_offsets"]
    for end in draw.choice(((0,), (1,), (0, 1))):
        offsets[end] += draw.choice((-64, -8, -4, -1, 1, 4, 8, 64, 1 << 40, 1 << 70))
    return json.dumps(header).encode()


def swap_offsets(text: bytes, draw: Random) -> bytes:
    """Give a tensor the bytes of another one."""
    header, names = _entries(text)
    header[draw.choice(names)]["data_offsets"] = header[draw.choice(names)]["data_offsets"]
    return json.dumps(header).encode()


def other_shape(text: bytes, draw: Random) -> bytes:
    """Give a tensor a shape of the same or of another size."""
    header, names = _entries(text)
    entry = header[draw.choice(names)]
    shape = entry["shape"]
    entry["shape"] = draw.choice(
        (
            shape[::-1],
            [*shape, 1],
            [1] * draw.choice((10, 70, 5_000)) + shape,
            [float(size) for size in shape],
            [str(size) for size in shape],
            [-size for size in shape],
            [*shape, 0, 1 << 62, 1 << 62],
            [True, *shape],
            [1 << 64, *shape],
        )
    )
    return json.dumps(header).encode()


def duplicate_tensor(text: bytes, draw: Random) -> bytes:
    """Write a tensor twice, alike or with the bytes of another one."""
    header, names = _entries(text)
    name = draw.choice(names)
    entry = header[draw.choice((name, draw.choice(names)))]
    return (
        b"{"
        + f"{json.dumps(name)}: {json.dumps(entry)}, ".encode()
        + json.dumps(header).encode()[1:]
    )


def rename_tensor(text: bytes, draw: Random) -> bytes:
    """Give a tensor a long or odd name."""
    header, names = _entries(text)
    entry = header.pop(draw.choice(names))
    new = draw.choice(_NAMES)
    header[new] = entry
    return json.dumps(header, ensure_ascii=draw.random() < 0.5 or not new.isprintable()).encode()


def other_dtype(text: bytes, draw: Random) -> bytes:
    """Give a tensor a dtype of another size, or one that is none."""
    header, names = _entries(text)
    entry = header[draw.choice(names)]
    entry["dtype"] = draw.choice(
        ("F64", "I32", "F8_E4M3", "F4", "f32", "", 1, None, ["F32"], "BOOL")
    )
    return json.dumps(header).encode()


#: Mutations of headers, which stay JSON.
HEADERS: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        shift_offsets,
        swap_offsets,
        other_shape,
        duplicate_tensor,
        rename_tensor,
        other_dtype,
    )
}


def _check_opened(opened: Checkpoint, model: Path) -> None:
    """Demand that what was accepted is what the safetensors library reads."""
    for file in sorted(model.glob("*.safetensors")):
        if not any(info.file == file for info in opened.tensors.values()):
            continue
        try:
            with safe_open(str(file), framework="pt") as library:
                names = [*library.keys()]
                for name in names:
                    ours = opened.read(name)
                    theirs = library.get_tensor(name)
                    alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape
                    demand(alike and _bits(ours) == _bits(theirs), f"expected {name!r:.80} alike")
        except SafetensorError as error:
            demand(False, f"expected {file.name} to be refused: {error}")
    for ask in (lambda: opened.merged, lambda: opened.carried, opened.fingerprint):
        read_or_refuse(ask)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _merge(prepared: Path, model: Path, scratch: Path) -> None:
    recipe = scratch / "recipe.yaml"
    data = {
        "base": str(prepared / "base"),
        "experts": {"expert": str(model)},
        "operator": "task_arithmetic",
        "coefficients": 0.5,
    }
    recipe.write_text(json.dumps(data))
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    code, _ = run_verb(["merge", str(recipe), "--out", str(out)])
    demand(code == 0 or not out.exists(), "expected nothing to be written")


def _check_torch(prepared: Path, scratch: Path, kind: str, draw: Random) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "pytorch_model.bin"
    source = prepared / ("legacy.pt" if kind == "legacy" else "archive.pt")
    change: Callable[[bytes, Random], bytes] = _damaged_pickle if kind == "pickle" else mutated
    file.write_bytes(change(source.read_bytes(), draw))
    found = read_or_refuse(partial(read_torch_file, file))
    for tensor in () if found is None else found.tensors.values():
        read_or_refuse(lambda tensor=tensor: tensor.read().clone())
    if found is not None and not draw.randrange(4):
        out = scratch / "converted"
        shutil.rmtree(out, ignore_errors=True)
        if run_verb(["convert", str(file), "--out", str(out)])[0] == 0:
            demand(read_or_refuse(partial(open_checkpoint, str(out))) is not None, "unreadable")


def _damaged_pickle(data: bytes, draw: Random) -> bytes:
    """Damage the pickle alone, in an archive that is whole."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                content = mutated(content, draw, ANY, TEXT)
            target.writestr(member.filename, content)
    return made.getvalue()
