"""Exact ranks without sorting: the r-th largest number of a stream, in two sequential reads.

The bits of a float, read as an unsigned integer, are in the order of its magnitude. So the r-th
largest is found as in a radix sort, 16 bits at a time and from the top: one histogram says in which
bin it lies, the next one counts inside that bin alone. Numbers of 32 bits take two reads of the
stream, of 64 bits four; a stream never has to fit in memory, and the first histogram serves every
rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.kernels.host import host_fp32
from mergesearch.merging.operators.parts.counting import BINS, DIGIT, digit_counts
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch

    #: What a tensor is, for messages, and the tensor.
    Named = tuple[str, torch.Tensor]

#: Starts a stream of named tensors; called once per read, must give the same numbers each time (in
#: any order).
Stream = Callable[[], Iterable["Named"]]
Bits = Literal[32, 64]

#: Numbers counted at a time: keys and counts stay in the second-level cache.
BLOCK = 1 << 18


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of numbers by their upper 16 bits: the first read of a selection, for any rank.

    Attributes:
        counts: ``(65536,)``, by the upper 16 bits of the key.
        bits: Width of the keys: 64 if the stream holds fp64, else 32.
        signed: Whether numbers are ordered by value rather than by magnitude.
    """

    counts: npt.NDArray[np.int64]
    bits: Bits
    signed: bool = False

    @property
    def total(self) -> int:
        """Count of all numbers of the stream."""
        return int(self.counts.sum())

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """As tensors, to be remembered."""
        import torch

        return {
            "counts": torch.from_numpy(self.counts),
            "kind": torch.tensor([self.bits, int(self.signed)]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Histogram:
        """From what :meth:`to_tensors` gave."""
        bits, signed = tensors["kind"].tolist()
        return cls(tensors["counts"].numpy(), 64 if bits == 64 else 32, bool(signed))


def magnitude_histogram(stream: Stream, *, signed: bool = False, place: Place = HOST) -> Histogram:
    """The first read: counts by the upper 16 bits, of magnitudes, or of values where ``signed``.

    Tensors on an accelerator are counted there, others at ``place``, to the same counts.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity; the message names it.
    """
    # fp64 anywhere makes all keys 64 bits wide; that is known only once it is met.
    histogram = _first_read(stream, 32, signed, place) or _first_read(stream, 64, signed, place)
    assert histogram is not None  # 64 bits hold every number
    return histogram


def kth_largest(
    stream: Stream,
    rank: int,
    *,
    signed: bool = False,
    first: Histogram | None = None,
    place: Place = HOST,
) -> float:
    """The exact magnitude of rank ``rank`` among all numbers of a stream, 1 being the largest.

    Where ``signed``, the value. The q-th smallest of n is the one of rank n + 1 − q.

    Args:
        stream: Starts a read of all numbers.
        rank: 1 to the count of all numbers.
        signed: Order by value, not by magnitude.
        first: :func:`magnitude_histogram` of the same stream, if it is known: saves a read.
        place: As for :func:`magnitude_histogram`.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity; the message names it.
        InputError: If there is no such rank.
    """
    histogram = first or magnitude_histogram(stream, signed=signed, place=place)
    if not 1 <= rank <= histogram.total:
        raise InputError(
            f"rank: expected 1 to {histogram.total}, the count of the numbers, received {rank}"
        )
    prefix, left = bin_of(histogram.counts, rank)
    for shift in range(histogram.bits - 2 * DIGIT, -1, -DIGIT):
        counts = _no_counts()
        for _, tensor in stream():
            _count_inside(tensor, histogram, prefix, shift, counts, place)
        digit, left = bin_of(counts, left)
        prefix = prefix << DIGIT | digit
    return _number(prefix, histogram.bits, histogram.signed)


def count_kept(density: float, total: int) -> int:
    """``ceil(density · total)``, at least 1.

    The density is read as a decimal: 0.07 of 100 is 7, although 0.07 · 100 > 7 in floating point.
    """
    return max(1, math.ceil(Fraction(repr(float(density))) * total))


def keep_largest(tensor: torch.Tensor, density: float, what: str = "tensor") -> torch.Tensor:
    """A new tensor with the ``ceil(density · n)`` largest magnitudes, and 0 elsewhere.

    Ties of the last one are kept, too.

    Raises:
        CheckpointError: If the tensor holds NaN or infinity; the message begins with ``what``.
    """
    if density >= 1 or tensor.numel() == 0:
        return tensor.clone()
    return keep_from(
        tensor, kth_largest(lambda: [(what, tensor)], count_kept(density, tensor.numel()))
    )


def keep_from(tensor: torch.Tensor, threshold: float) -> torch.Tensor:
    """A new tensor that keeps magnitudes of at least ``threshold`` and is 0 elsewhere."""
    return trim(tensor.clone(), threshold)


def trim(tensor: torch.Tensor, threshold: float) -> torch.Tensor:
    """The tensor itself, with magnitudes below ``threshold`` set to 0."""
    limit = _representable(threshold, tensor)
    numbers = host_fp32(tensor)
    if numbers is None:
        return tensor.masked_fill_(tensor.abs() < limit, 0.0)
    from mergesearch.merging.kernels.sparse_numba import drop_below

    drop_below(numbers, np.float32(limit))
    return tensor


def largest_mask(tensor: torch.Tensor, count: int, first: Histogram | None = None) -> torch.Tensor:
    """True at exactly ``count`` elements of the largest magnitude; ties go by position.

    ``first`` is the tensor's :func:`magnitude_histogram`, if it is known.
    """
    import torch

    if not 0 < count < tensor.numel():
        return torch.full_like(tensor, count > 0, dtype=torch.bool)
    threshold = kth_largest(lambda: [("tensor", tensor)], count, first=first)
    magnitudes = tensor.detach().abs().reshape(-1)
    mask = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero().reshape(-1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(tensor.shape)


def _representable(threshold: float, tensor: torch.Tensor) -> float:
    """The least number of the tensor's dtype that is not below the threshold, which is fp64."""
    import torch

    if tensor.dtype == torch.float64:
        return threshold
    near = np.float32(threshold)
    return float(near if float(near) >= threshold else np.nextafter(near, np.float32(np.inf)))


def _first_read(stream: Stream, bits: Bits, signed: bool, place: Place) -> Histogram | None:
    """Counts of the uppermost digit, or None if the numbers do not fit keys of this width."""
    import torch

    counts = _no_counts()
    for what, tensor in stream():
        if tensor.dtype == torch.float64 and bits == 32:
            return None
        _count_upper(tensor, bits, signed, counts, place)
        if _has_non_finite(counts, bits, signed):
            raise CheckpointError(
                f"{what}: expected finite numbers to rank by magnitude, received NaN or infinity; "
                "leave that checkpoint out, or save it again"
            )
    return Histogram(counts, bits, signed)


def _count_upper(
    tensor: torch.Tensor, bits: Bits, signed: bool, counts: npt.NDArray[np.int64], place: Place
) -> None:
    """Count the numbers by the uppermost digit of their keys."""
    if place.device_of(tensor).type != "cpu":
        counts += digit_counts(tensor, bits, signed, bits - DIGIT, None, place)
        return
    numbers = None if signed or bits == 64 else host_fp32(tensor)
    if numbers is None:
        for keys in _keys(tensor, bits, signed):
            _count(keys >> (bits - DIGIT), counts)
        return
    from mergesearch.merging.kernels.sparse_numba import count_upper

    four = np.zeros(4 * BINS, dtype=np.int64)
    count_upper(numbers.view(np.uint32), four)
    counts += four.reshape(4, BINS).sum(axis=0)


def _count_inside(
    tensor: torch.Tensor,
    histogram: Histogram,
    prefix: int,
    shift: int,
    counts: npt.NDArray[np.int64],
    place: Place,
) -> None:
    """Count the numbers whose key begins with ``prefix`` by the digit that follows it."""
    if place.device_of(tensor).type != "cpu":
        counts += digit_counts(tensor, histogram.bits, histogram.signed, shift, prefix, place)
        return
    numbers = None if histogram.signed or histogram.bits == 64 else host_fp32(tensor)
    if numbers is None:
        for keys in _keys(tensor, histogram.bits, histogram.signed):
            _count(keys[keys >> (shift + DIGIT) == prefix] >> shift, counts)
        return
    from mergesearch.merging.kernels.sparse_numba import count_lower

    count_lower(numbers.view(np.uint32), np.uint32(prefix), counts)


def _has_non_finite(counts: npt.NDArray[np.int64], bits: Bits, signed: bool) -> bool:
    """Whether a number has all bits of its exponent set."""
    infinity = 0x7F80 if bits == 32 else 0x7FF0
    if not signed:
        return bool(counts[infinity:].any())
    return bool(counts[infinity | 0x8000 :].any() or counts[: BINS - (infinity | 0x8000)].any())


def _keys(tensor: torch.Tensor, bits: Bits, signed: bool) -> Iterable[npt.NDArray[Any]]:
    """The numbers as unsigned integers in the same order, block by block."""
    import torch

    wide = torch.float32 if bits == 32 else torch.float64
    numbers = tensor.detach().to("cpu", wide).reshape(-1).contiguous().numpy()
    unsigned: npt.NDArray[Any] = numbers.view(np.uint32 if bits == 32 else np.uint64)
    sign: Any = unsigned.dtype.type(1 << (bits - 1))
    for start in range(0, unsigned.size, BLOCK):
        block = unsigned[start : start + BLOCK]
        # By value: the order of negative numbers is reversed, and they come below positive ones.
        yield np.where(block & sign, ~block, block | sign) if signed else block & ~sign


def _number(key: int, bits: Bits, signed: bool) -> float:
    """The number whose key, as of :func:`_keys`, is given."""
    sign = 1 << (bits - 1)
    if signed:
        key = key ^ sign if key & sign else ~key & (2 * sign - 1)
    unsigned, floating = (np.uint32, np.float32) if bits == 32 else (np.uint64, np.float64)
    return float(np.array([key], dtype=unsigned).view(floating)[0])


def _count(keys: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> None:
    """Count keys by their last 16 bits."""
    if keys.size:
        counts += np.bincount((keys & keys.dtype.type(BINS - 1)).astype(np.intp), minlength=BINS)


def _no_counts() -> npt.NDArray[np.int64]:
    return np.zeros(BINS, dtype=np.int64)


def bin_of(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the number of this rank from above, and its rank inside the bin."""
    # Two short searches are several times faster than one over all bins.
    rows = counts.reshape(-1, 256)
    row, left = _find(rows.sum(axis=1), rank)
    column, left = _find(rows[row], left)
    return row * 256 + column, left


def _find(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of the number of this rank from above, and its rank inside the bin."""
    from_above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_above, rank))
    return len(counts) - 1 - index, rank - (int(from_above[index - 1]) if index else 0)
