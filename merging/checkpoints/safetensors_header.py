"""The header of a safetensors file: parsed and checked before any weight is read.

A safetensors file is eight bytes of header length, a JSON header (name -> dtype, shape, byte
range), and the tensors without gaps. What the safetensors library refuses is refused here, with
the place named, and in addition what it lets pass: names that stand twice, and names, shapes and
dtypes that nothing here can hold. Source: ``safetensors/src/tensor.rs`` of the library.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown

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

#: The largest header, in bytes: the format's own limit.
HEADER_LIMIT = 100_000_000
#: The longest name of a tensor; names of real models have at most about 200 characters.
NAME_LIMIT = 1000
#: The most dimensions of a tensor; numpy's limit.
DIMENSIONS = 64
#: One above the largest number of elements that torch counts.
COUNT_LIMIT = 1 << 63

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_WHOLE = frozenset({int})
_TWO = [int, int]
_AGAIN = "the file is damaged, download it again"


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
    where = path_shown(file)
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f"{where}: expected a file, received a folder, pipe or device")
        size = about.st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise CheckpointError(_truncation(where, head, length, size))
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{where}: expected a safetensors header of at most {HEADER_LIMIT} bytes, "
                    f"received one of {length}; {_AGAIN}"
                )
            text = stream.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or name_shown(str(error))
        raise CheckpointError(f"{where}: expected a readable file, received: {reason}") from error
    return _Header(file, where, 8 + length).tensors(text, size)


def _truncation(where: str, head: bytes, length: int, size: int) -> str:
    if head.startswith(b"version "):
        return (
            f"{where}: expected weights, received a git-lfs pointer; run `git lfs pull` in its "
            "folder"
        )
    return (
        f"{where}: expected a safetensors header of {length} bytes, received a file of {size} "
        "bytes; it is truncated or no safetensors file, download it again"
    )


@dataclass(frozen=True)
class _Header:
    """A header that is checked.

    Attributes:
        file: The file.
        where: The file, as errors name it.
        data: Byte of the file at which the weights begin.
    """

    file: Path
    where: str
    data: int

    def tensors(self, text: bytes, size: int) -> dict[str, TensorInfo]:
        """Tensors of a header, in its order, in time that grows with its length alone."""
        entries = self._parsed(text)
        self._check_metadata(entries.pop(_METADATA, None))
        long = next((name for name in entries if len(name) > NAME_LIMIT), None)
        if long is not None:
            self._broken(
                f"tensor {shown(long)}: expected a name of at most {NAME_LIMIT} characters, "
                f"received {len(long)}"
            )
        odd = next((name for name in entries if not name.isprintable()), None)
        if odd is not None:  # libraries write names to the terminal as they are
            self._broken(f"expected names that can be printed, received {shown(odd)}")
        found = {name: self._tensor(name, value) for name, value in entries.items()}
        self._check_places(found, size)
        return found

    def _parsed(self, text: bytes) -> dict[str, Any]:
        """The outermost object, in which every key stands once."""
        try:
            decoded = text.decode("utf-8")
            entries = json.loads(decoded, parse_constant=self._no_number)
            # Every key has its colon: where there are more, some may have been overwritten.
            if type(entries) is dict and decoded.count(":") != _count_keys(entries):
                entries = json.loads(decoded, object_pairs_hook=self._once)
        except RecursionError:
            self._broken("nested too deeply")
        except ValueError as error:  # no UTF-8 and integers of 5,000 digits among it
            self._broken(name_shown(str(error), 120))
        if type(entries) is not dict:
            self._broken(f"expected names of tensors, received {shown(entries)}")
        if "\\u" in decoded:
            self._check_names(entries)
        return entries

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    self._broken(f"expected each name and key once, received {shown(name)} twice")
                seen.add(name)
        return made

    def _tensor(self, name: str, value: Any) -> TensorInfo:
        """One entry; what is wrong with it is only looked for where something is."""
        if type(value) is not dict or not value.keys() >= _FIELDS:
            received = f"only {shown(', '.join(value))}" if type(value) is dict else shown(value)
            self._broken(
                f"tensor {shown(name)}: expected {', '.join(sorted(_FIELDS))}, received {received}"
            )
        code = value["dtype"]
        known = DTYPES.get(code) if type(code) is str else None
        if known is None:
            other = name_shown(code, 20) if type(code) is str else shown(code)
            raise CheckpointError(
                f"{self.where}: tensor {shown(name)}: expected one of {', '.join(DTYPES)}, "
                f"received unknown dtype {other}; convert the checkpoint first (quantised "
                "weights cannot be merged)"
            )
        shape = value["shape"]
        if not _are_sizes(shape) or len(shape) > DIMENSIONS:
            self._broken(
                f"tensor {shown(name)}: expected a shape of at most {DIMENSIONS} whole numbers, "
                f"received {_listed(shape)}"
            )
        offsets = value["data_offsets"]
        if type(offsets) is not list or [*map(type, offsets)] != _TWO:
            self._broken(
                f"tensor {shown(name)}: expected data_offsets of two whole numbers, received "
                f"{_listed(offsets)}"
            )
        start, stop = offsets
        wanted = math.prod(shape) * known[1]
        if start < 0 or stop - start != wanted or (not wanted and is_too_wide(shape)):
            raise CheckpointError(
                f"{self.where}: tensor {shown(name)}: expected {shown(wanted)} bytes for {code} "
                f"{_listed(shape)}, received {shown(stop - start)}; {_AGAIN}"
            )
        return TensorInfo(tuple(shape), known[0], self.file, self.data + start, self.data + stop)

    def _check_metadata(self, value: Any) -> None:
        if value is None:
            return
        if type(value) is not dict or not all(type(text) is str for text in value.values()):
            self._broken(f"{_METADATA}: expected texts by name, received {shown(value)}")

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                self._broken(f"expected names in Unicode, received a lone surrogate, {shown(name)}")

    def _check_places(self, tensors: dict[str, TensorInfo], size: int) -> None:
        """Refuse tensors that overlap or leave gaps, and files of another length."""
        end = self.data
        for name, info in sorted(tensors.items(), key=_place):
            if info.start != end:
                what = "leaves a gap" if info.start > end else "overlaps with another tensor"
                raise CheckpointError(
                    f"{self.where}: tensor {shown(name)}: expected its bytes to begin at "
                    f"{end - self.data} of the weights, received {shown(info.start - self.data)}, "
                    f"which {what}; {_AGAIN}"
                )
            end = info.stop
        if end != size:
            reason = "it is truncated" if end > size else "it has bytes that no tensor owns"
            raise CheckpointError(
                f"{self.where}: expected {shown(end)} bytes, received a file of {size} bytes; "
                f"{reason}, download it again"
            )

    def _no_number(self, name: str) -> NoReturn:
        self._broken(f"expected finite numbers, received {name}")

    def _broken(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: expected a safetensors header, received broken JSON ({what}); "
            "download it again"
        ) from None


def _count_keys(entries: dict[str, Any]) -> int:
    """Number of keys in an object and in the objects right inside it."""
    return len(entries) + sum(len(value) for value in entries.values() if type(value) is dict)


def _place(entry: tuple[str, TensorInfo]) -> tuple[int, int]:
    return entry[1].start, entry[1].stop


def _are_sizes(values: Any) -> bool:
    return type(values) is list and (
        not values or ({*map(type, values)} == _WHOLE and min(values) >= 0)
    )


def is_too_wide(shape: Sequence[int]) -> bool:
    """Whether the dimensions of an empty tensor overflow; their number is bounded already."""
    return math.prod(size for size in shape if size) >= COUNT_LIMIT


def _listed(values: Any) -> str:
    """A short list of plain values as it stands, others by their kind."""
    if type(values) is not list or len(values) > 6:
        return shown(values)
    return f"[{', '.join(map(shown, values))}]"
