"""Folders of safetensors files, read through their headers alone."""

from __future__ import annotations

import hashlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.pipelines import stem_in
from mergesearch.merging.checkpoints.safetensors_header import DTYPES, TensorInfo, read_header
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.reading import decode, read_bytes
from mergesearch.merging.foreign.shown import cut, name_shown, path_shown, shown, shown_names

__all__ = [
    "CODES",
    "COMPANIONS",
    "DTYPES",
    "INDEX",
    "ITEMSIZE",
    "PICKLES",
    "WEIGHTS",
    "TensorInfo",
    "folder_tensors",
    "hash_bytes",
    "read_header",
    "read_json",
    "refuse_other_files",
    "weight_map",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: dtype name -> safetensors' code.
CODES = {name: code for code, (name, _) in DTYPES.items()}

#: dtype name -> bytes per element.
ITEMSIZE = dict(DTYPES.values())

#: Files that need pickle (or code) to be read.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

#: What a model folder holds beside its weights: configuration, tokenizer, preprocessor, licence.
#: Never code or pickle.
COMPANIONS = (
    *("config.json", "generation_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "normalizer.json",
    ),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "bpe.codes",
        "dict.txt",
        "tekken.json",
        "*.tiktoken",
    ),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "NOTICE*"),
)

#: Files whose headers are read at the same time.
HEADERS_AT_A_TIME = 8
_BLOCK = 1 << 22  # bytes read at a time when hashing


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of a folder of transformers or diffusers: of one file, or of shards with an index.

    Where there are both, the one file wins, as in transformers.

    Raises:
        CheckpointError: If there are no safetensors weights, or they are damaged or incomplete.
    """
    stem = stem_in(folder)
    if stem is None:
        raise CheckpointError(_why_no_weights(folder))
    if (folder / f"{stem}.safetensors").is_file():
        return read_header(folder / f"{stem}.safetensors")
    return _sharded_tensors(folder, folder / f"{stem}.safetensors.index.json")


def _why_no_weights(folder: Path) -> str:
    expected = f"{path_shown(folder)}: expected {WEIGHTS} or {INDEX}, received"
    if (folder / "adapter_config.json").exists():
        return (
            f"{expected} a PEFT adapter; merge it into its base first (peft's merge_and_unload) "
            "and save the result"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{expected} {_names(others)}; give the path of one file instead"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return f"{expected} only {_names(pickles)}; {_CONVERT}"
    return f"{expected} no weights; give a folder written by save_pretrained"


_CONVERT = (
    "pickle is never read, write it as safetensors with `mergesearch convert PATH --out FOLDER`"
)


def _names(names: Sequence[str]) -> str:
    return cut(", ".join(map(name_shown, names[:6])), 120)


def refuse_other_files(file: Path) -> None:
    """Raise a CheckpointError unless ``file`` is named like a safetensors file."""
    if any(file.match(pattern) for pattern in PICKLES):
        raise CheckpointError(
            f"{path_shown(file)}: expected a .safetensors file, received "
            f"{name_shown(file.name)}; {_CONVERT}"
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{path_shown(file)}: expected a folder or a .safetensors file, received "
            f"{name_shown(file.name)}"
        )


def _sharded_tensors(folder: Path, file: Path) -> dict[str, TensorInfo]:
    shard_of = weight_map(file)
    shards = sorted({*shard_of.values()})
    for shard in shards:
        if Path(shard).name != shard or not is_file(folder / shard):
            raise CheckpointError(
                f"{path_shown(file)}: expected shard {shown(shard)} in its folder, "
                "received no such file"
            )
    stored: dict[str, TensorInfo] = {}
    for shard, header in zip(shards, _headers([folder / shard for shard in shards]), strict=True):
        for name, info in header.items():
            if shard_of.get(name) != shard:
                raise CheckpointError(
                    f"{path_shown(folder / shard)}: tensor {shown(name)}: expected the "
                    f"index to place it here, received {shown(shard_of.get(name))}; save the model "
                    "again"
                )
            stored[name] = info
    missing = sorted(set(shard_of) - set(stored))
    if missing:
        raise CheckpointError(
            f"{path_shown(file)}: expected tensor {shown(missing[0])} in "
            f"{name_shown(shard_of[missing[0]])}, received none"
        )
    return stored


def _headers(files: Sequence[Path]) -> Iterator[dict[str, TensorInfo]]:
    """Headers of files, in order, several read at a time: shared storage answers each slowly."""
    with ThreadPoolExecutor(min(len(files), HEADERS_AT_A_TIME)) as pool:
        yield from pool.map(read_header, files)


def weight_map(file: Path) -> dict[str, str]:
    """Name of a tensor -> name of its shard, as an index of shards says."""
    index = read_json(file, unique=True)
    where = path_shown(file)
    if not index.get("weight_map") or not isinstance(index["weight_map"], dict):
        raise CheckpointError(
            f"{where}: expected a 'weight_map', received keys {shown_names(index)}"
        )
    node = Node(index["weight_map"], f"{where}: weight_map", CheckpointError)
    return {name: shard.text() for name, shard in node.members()}


def read_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """Content of a JSON object file.

    Args:
        file: Where it is.
        unique: Whether a key that stands twice is refused.

    Raises:
        CheckpointError: If it cannot be read or holds anything else.
    """
    where = path_shown(file)
    raw = read_bytes(file, error=CheckpointError)
    if raw.startswith(BOM_UTF8):  # which transformers, where it reads the same file, does not take
        raise CheckpointError(
            f"{where}: expected readable JSON, received a byte order mark; save it as UTF-8 "
            "without one"
        )
    text = decode(raw, where, CheckpointError)
    data = parse_json(text, where, CheckpointError, unique=unique)
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected a JSON object, received {type(data).__name__}")
    return data


def hash_bytes(info: TensorInfo) -> str:
    """SHA-256 of a tensor's bytes, read in blocks."""
    digest = hashlib.sha256()
    left = info.stop - info.start
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            while left:
                block = stream.read(min(_BLOCK, left))
                if not block:
                    raise CheckpointError(
                        f"{path_shown(info.file)}: expected {left} more bytes, received "
                        "the end of the file; it changed since it was opened"
                    )
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise CheckpointError(
            f"{path_shown(info.file)}: expected a readable file, received: "
            f"{error.strerror or error}"
        ) from error
    return digest.hexdigest()
