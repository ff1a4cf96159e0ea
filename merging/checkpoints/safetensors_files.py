"""Safetensors files and folders of them, read through their headers alone.

A safetensors file is eight bytes of header length, a JSON header (name -> dtype, shape, byte
range), and the tensors without gaps. Parsing it here rather than through a library means that
damage is seen, and named, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.pipelines import stem_in
from mergesearch.merging.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: safetensors' dtype codes -> (name, bytes per element).
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

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

_BLOCK = 1 << 22  # bytes read at a time when hashing


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies: bytes ``start:stop`` of ``file``."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointError: If the file is no safetensors file, or is cut short or otherwise damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise CheckpointError(_truncation(file, head, length, size))
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a readable file, received: {error.strerror}"
        ) from error
    return _parse_header(file, text, data=8 + length, size=size)


def _truncation(file: Path, head: bytes, length: int, size: int) -> str:
    if head.startswith(b"version "):
        return (
            f"{file}: expected weights, received a git-lfs pointer; run `git lfs pull` in its "
            "folder"
        )
    return (
        f"{file}: expected a safetensors header of {length} bytes, received a file of {size} "
        "bytes; it is truncated or no safetensors file, download it again"
    )


def _parse_header(file: Path, text: bytes, data: int, size: int) -> dict[str, TensorInfo]:
    try:
        header = json.loads(text)
        entries = [
            (name, *_entry(value)) for name, value in header.items() if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors header, received broken JSON ({error}); download it "
            "again"
        ) from error
    tensors = {}
    end = 0
    for name, code, shape, start, stop in entries:
        if code not in DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r}: expected one of {', '.join(DTYPES)}, received unknown "
                f"dtype {code}; convert the checkpoint first (quantised weights cannot be merged)"
            )
        dtype, itemsize = DTYPES[code]
        if start < 0 or stop - start != math.prod(shape) * itemsize:
            raise CheckpointError(
                f"{file}: tensor {name!r}: expected {math.prod(shape) * itemsize} bytes for {code} "
                f"{list(shape)}, received {stop - start}; the file is damaged, download it again"
            )
        end = max(end, stop)
        tensors[name] = TensorInfo(shape, dtype, file, data + start, data + stop)
    if data + end != size:
        reason = "it is truncated" if data + end > size else "it has bytes that no tensor owns"
        raise CheckpointError(
            f"{file}: expected {data + end} bytes, received a file of {size} bytes; {reason}, "
            "download it again"
        )
    return tensors


def _entry(value: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = value["data_offsets"]
    return str(value["dtype"]), tuple(int(n) for n in value["shape"]), int(start), int(stop)


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
    expected = f"{folder}: expected {WEIGHTS} or {INDEX}, received"
    if (folder / "adapter_config.json").exists():
        return (
            f"{expected} a PEFT adapter; merge it into its base first (peft's merge_and_unload) "
            "and save the result"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{expected} {', '.join(others[:6])}; give the path of one file instead"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return f"{expected} only {', '.join(pickles[:6])}; {_CONVERT}"
    return f"{expected} no weights; give a folder written by save_pretrained"


_CONVERT = (
    "pickle is never read, write it as safetensors with `mergesearch convert PATH --out FOLDER`"
)


def refuse_other_files(file: Path) -> None:
    """Raise a CheckpointError unless ``file`` is named like a safetensors file."""
    if any(file.match(pattern) for pattern in PICKLES):
        raise CheckpointError(
            f"{file}: expected a .safetensors file, received {file.name}; {_CONVERT}"
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file}: expected a folder or a .safetensors file, received {file.name}"
        )


def _sharded_tensors(folder: Path, file: Path) -> dict[str, TensorInfo]:
    index = read_json(file)
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{file}: expected a 'weight_map', received keys {sorted(index)}")
    stored: dict[str, TensorInfo] = {}
    for shard in sorted({str(shard) for shard in shard_of.values()}):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(
                f"{file}: expected shard {shard!r} in its folder, received no such file"
            )
        for name, info in read_header(folder / shard).items():
            if shard_of.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: tensor {name!r}: expected the index to place it here, "
                    f"received {shard_of.get(name)!r}; save the model again"
                )
            stored[name] = info
    missing = sorted(set(shard_of) - set(stored))
    if missing:
        raise CheckpointError(
            f"{file}: expected tensor {missing[0]!r} in {shard_of[missing[0]]}, received none"
        )
    return stored


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object file.

    Raises:
        CheckpointError: If it cannot be read or holds anything else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected readable JSON, received: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, received {type(data).__name__}")
    return data


def hash_bytes(info: TensorInfo) -> str:
    """SHA-256 of a tensor's bytes, read in blocks."""
    digest = hashlib.sha256()
    left = info.stop - info.start
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        while left:
            block = stream.read(min(_BLOCK, left))
            if not block:
                raise CheckpointError(
                    f"{info.file}: expected {left} more bytes, received the end of the file"
                )
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
