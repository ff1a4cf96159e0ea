"""Weights in files that ``torch.save`` wrote, found without unpickling anything.

Such a file is a pickle, of which :mod:`.pickle_values` gives the values as plain data, and storages
beside it: members of a zip archive, or since before torch 1.6 bytes behind the pickle. Formats:
``torch/serialization.py`` of pytorch. A tensor is a view of a storage, so that what is needed is
its bytes, shape and strides.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import read_tensor
from mergesearch.merging.checkpoints.pickle_values import (
    Made,
    Named,
    Persistent,
    read_pickle,
)
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.checkpoints.safetensors_header import (
    DIMENSIONS,
    NAME_LIMIT,
    is_too_wide,
)
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.paths import exists, is_file
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown

if TYPE_CHECKING:
    import torch

#: Class of a storage -> dtype.
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.BFloat16Storage": "bfloat16",
    "torch.HalfStorage": "float16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
#: Functions that make a tensor of storage, offset, shape and strides, and what wraps a tensor.
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_WRAPPERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
#: What damaged pickles and archives raise, text that cannot be decoded among it.
_DAMAGE = (ValueError, zipfile.BadZipFile, NotImplementedError, struct.error, EOFError)
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_SAVE = "save the model's state_dict() with safetensors where it was made"

#: Key of a storage -> its bytes in the file.
Places = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class StridedTensor:
    """A tensor in a file: the bytes from its first element to its last, and how it lies there."""

    info: TensorInfo
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all elements, without gaps between them."""
        return math.prod(self.info.shape) * ITEMSIZE[self.info.dtype]

    def read(self) -> torch.Tensor:
        """The tensor, memory-mapped."""
        info = self.info
        count = (info.stop - info.start) // ITEMSIZE[info.dtype]
        flat = read_tensor(TensorInfo((count,), info.dtype, info.file, info.start, info.stop))
        return flat.as_strided(info.shape, self.strides) if count else flat.reshape(info.shape)


@dataclass(frozen=True)
class TorchFile:
    """What a file of torch holds.

    Attributes:
        tensors: By name.
        left: Names of entries beside them that are no tensors.
    """

    tensors: Mapping[str, StridedTensor]
    left: tuple[str, ...]


def read_torch_file(file: Path, key: str | None = None) -> TorchFile:
    """The tensors of a state dict that ``torch.save`` wrote; their numbers are not read.

    Args:
        file: The file.
        key: Where a dictionary holds several state dicts, the name of the one that is meant.

    Raises:
        CheckpointError: In one line, if it holds something else or is damaged.
    """
    if exists(file) and not is_file(file):
        raise _unlike(file, "no regular file", "check the path")
    try:
        with file.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        root, places = _read_zip(file) if zipped else _read_legacy(file)
        state = _state(file, root, key)
        tensors: dict[str, StridedTensor] = {}
        left: list[str] = []
        for name, value in state.items():
            found = _tensor(file, str(name), value, places)
            if found is None:
                left.append(str(name))
                continue
            _check_name(file, str(name), tensors)
            tensors[str(name)] = found
    except OSError as error:
        raise _unlike(
            file, f"an error: {error.strerror or name_shown(str(error))}", "check the path"
        ) from error
    except _DAMAGE as error:
        raise _unlike(
            file, f"another or a damaged file: {name_shown(str(error), 120)}", "download it again"
        ) from error
    return TorchFile(tensors, tuple(left))


def _read_zip(file: Path) -> tuple[Any, Places]:
    """The pickled value of an archive, and the members that are storages."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("/data.pkl") for name in members if _is_root(name)]
        if len(roots) != 1 or f"{roots[0]}/constants.pkl" in members:
            kind = "an archive of TorchScript" if roots else "another archive"
            raise _unlike(file, kind, _SAVE)
        root = roots[0]
        packed = [name for name, member in members.items() if _is_packed(member)]
        if packed:
            raise _unlike(file, f"compressed {shown(packed[0])}", _SAVE)
        order = members.get(f"{root}/byteorder")
        if order is not None and archive.read(order) != b"little":
            raise _unlike(file, "numbers of another byte order", _SAVE)
        value, _ = read_pickle(io.BytesIO(archive.read(f"{root}/data.pkl")))
        data = f"{root}/data/"
        return value, {
            name.removeprefix(data): _bytes_of(stream, member)
            for name, member in members.items()
            if name.startswith(data)
        }


def _is_root(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")


def _is_packed(member: zipfile.ZipInfo) -> bool:
    """Whether its bytes in the file are not those that it stands for."""
    encrypted = member.flag_bits & 1
    return bool(member.compress_type or encrypted or member.compress_size != member.file_size)


def _bytes_of(stream: io.BufferedReader, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes lie: behind its own header, whose length only itself tells."""
    stream.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    start = member.header_offset + 30 + name + extra
    return start, min(start + member.file_size, os.fstat(stream.fileno()).st_size)


def _read_legacy(file: Path) -> tuple[Any, Places]:
    """The pickled value of a file from before torch 1.6, and its storages behind the pickles."""
    size = file.stat().st_size
    if not size:
        raise _unlike(file, "an empty file", "download it again")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        pages_stream: Any = pages
        if pages[:8] == b"version ":
            raise _unlike(file, "a git-lfs pointer", "run `git lfs pull` in its folder")
        magic, _ = read_pickle(pages_stream)
        if magic != _MAGIC:
            raise _unlike(file, "another pickle", _SAVE)
        version, _ = read_pickle(pages_stream)
        system, _ = read_pickle(pages_stream)
        if version != _VERSION or not isinstance(system, dict) or not system.get("little_endian"):
            raise _unlike(file, "another version or byte order", _SAVE)
        value, persistents = read_pickle(pages_stream)
        keys, _ = read_pickle(pages_stream)
        dtypes = dict(_storage(file, one) for one in persistents)
        names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
        if names != keys or not {*names} <= {*dtypes}:
            raise _unlike(file, "storages that nothing refers to", "download it again")
        places: dict[str, tuple[int, int]] = {}
        for key in names:
            (count,) = struct.unpack("<q", pages.read(8))
            start = pages.tell()
            stop = start + count * ITEMSIZE[dtypes[key]]
            if count < 0 or stop > size:
                raise _unlike(file, "a file that is cut short", "download it again")
            places[key] = (start, stop)
            pages.seek(stop)
    return value, places


def _storage(file: Path, found: Any) -> tuple[str, str]:
    """Key and dtype of a storage that a pickle refers to."""
    key = found.key if isinstance(found, Persistent) else None
    if not isinstance(key, tuple) or len(key) < 5 or not isinstance(key[2], str):
        raise _unlike(file, "a reference to something else than a storage", _SAVE)
    kind = key[1].name if isinstance(key[1], Named) else ""
    if kind not in _STORAGES:
        raise _unlike(
            file, f"a storage {shown(kind)}", f"{_SAVE}; quantised weights cannot be merged"
        )
    if len(key) > 5 and key[5] is not None:
        raise _unlike(file, "a storage inside another one", _SAVE)
    return key[2], _STORAGES[kind]


def _state(file: Path, root: Any, key: str | None) -> Mapping[Any, Any]:
    """The state dict: the value itself, or the one dictionary in it that holds tensors."""
    if not isinstance(root, dict):
        kind = root.name if isinstance(root, Made) else type(root).__name__
        raise _unlike(file, f"an object of {name_shown(kind)}", _SAVE)
    if key is None and _has_tensors(root):
        return root
    nested: dict[Any, dict[Any, Any]] = {
        name: value for name, value in root.items() if _has_tensors(value)
    }
    if key is None and len(nested) == 1:
        return next(iter(nested.values()))
    if key in nested:
        return nested[key]
    names = ", ".join(name_shown(each, 20) for each in sorted(map(str, nested))[:6])
    if key is None and not nested:
        raise _unlike(file, "no tensors", _SAVE)
    received = f"none of the name {shown(key)}" if key is not None else "several"
    raise _unlike(file, f"{received} (there are: {names or 'none'})", "name one with --key")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(_is_tensor(one) for one in value.values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Made) and value.name in (*_TENSORS, *_WRAPPERS)


def _check_name(file: Path, name: str, tensors: Mapping[str, StridedTensor]) -> None:
    """Refuse names that no safetensors file can have, and 1 beside "1"."""
    if name in tensors:
        raise _unlike(file, f"two tensors of the name {shown(name)}", _SAVE)
    if len(name) > NAME_LIMIT:
        raise _unlike(file, f"a name of {len(name)} characters", _SAVE)
    if not name.isprintable():
        raise _unlike(file, f"a name that cannot be printed, {shown(name)}", _SAVE)
    name.encode("utf-8")  # a lone surrogate is an UnicodeEncodeError, a ValueError


def _tensor(file: Path, name: str, value: Any, places: Places) -> StridedTensor | None:
    """The tensor of an entry, or None for plain data such as a number."""
    while isinstance(value, Made) and value.name in _WRAPPERS:
        value = value.arguments[0] if _has(value, 1) else None
    if not isinstance(value, Made | Named | Persistent) or name.endswith("_extra_state"):
        return None
    if not isinstance(value, Made) or value.name not in _TENSORS or not _has(value, 4):
        kind = "a reference" if isinstance(value, Persistent) else value.name
        raise _unlike(
            file,
            f"{name_shown(kind)} for {shown(name)}",
            f"{_SAVE}; quantised weights cannot be merged",
        )
    storage, offset, shape, strides = value.arguments[:4]
    key, dtype = _storage(file, storage)
    if not _are_sizes([offset]) or not _are_sizes(shape) or not _are_sizes(strides):
        raise _unlike(file, f"no shape for {shown(name)}", "download it again")
    if len(shape) > DIMENSIONS or is_too_wide(shape):
        raise _unlike(file, f"a shape of {len(shape)} dimensions for {shown(name)}", _SAVE)
    start, stop = places.get(key, (0, 0))
    width = ITEMSIZE[dtype]
    first = start + offset * width
    last = first + _extent(shape, strides) * width
    if last > stop or math.prod(shape) * width > stop - start or len(shape) != len(strides):
        raise _unlike(file, f"too few bytes for {shown(name)}", "download it again")
    return StridedTensor(TensorInfo(tuple(shape), dtype, file, first, last), tuple(strides))


def _has(made: Made, count: int) -> bool:
    return isinstance(made.arguments, tuple) and len(made.arguments) >= count


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=False))


def _unlike(file: Path, received: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{path_shown(file)}: expected a state dict as torch.save writes it, received "
        f"{received}; {remedy}"
    )
