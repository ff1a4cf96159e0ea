"""Sources combined as they are stored, fp32 or bf16, in one pass and without widened copies.

The same operations in the same order as :func:`mergesearch.merging.kernels.combine` on widened
rows, so the same bits; blocks that stay in the first-level cache take the place of copies. bf16 is
the upper half of fp32: widening is a shift, narrowing rounds to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from mergesearch.merging.kernels.numba_kernel import _add1, _pointer, _set1, compiled

#: Elements at a time.
BLOCK = 1024

_FP32 = 0
_BF16 = 1
_ROW = types.Array(types.float32, 1, "C")
_BITS = types.Array(types.uint16, 1, "C")


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_typing_context: Any, _bits: Any) -> Any:
    """The fp32 number of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_typing_context: Any, _number: Any) -> Any:
    """The 32 bits of an fp32 number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _half_pointer(_typing_context: Any, _address: Any) -> Any:
    """The address, an int64, as a pointer to 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.int64), generate


@compiled(types.void(_ROW, _ROW))
def _copy(out: Any, source: Any) -> None:
    for i in range(out.size):
        out[i] = source[i]


@compiled(types.void(_ROW, _BITS))
def _widen(out: Any, source: Any) -> None:
    for i in range(out.size):
        out[i] = float_of(np.uint32(source[i]) << np.uint32(16))


@compiled(types.void(_BITS, _ROW))
def _narrow(out: Any, source: Any) -> None:
    for i in range(out.size):
        bits = bits_of(source[i])
        rounded = (
            bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        ) >> np.uint32(16)
        out[i] = np.uint16(rounded) if source[i] == source[i] else np.uint16(0x7FC0)


@compiled(types.void(_ROW, _ROW))
def _subtract(row: Any, other: Any) -> None:
    for i in range(row.size):
        row[i] = row[i] - other[i]


@compiled(types.void(_ROW, types.int64, types.int64, types.int64))
def _load(out: Any, address: int, kind: int, start: int) -> None:
    """Elements from ``start`` of the source at ``address``, as many as fit, in fp32."""
    if kind == 0:
        _copy(out, numba.carray(_pointer(address + 4 * start), out.size))
    else:
        _widen(out, numba.carray(_half_pointer(address + 2 * start), out.size))


@compiled(_ROW(types.int64, types.int64, types.int64, _ROW))
def _row_of(address: int, kind: int, start: int, room: Any) -> Any:
    """As many elements as fit in ``room``: fp32 where they lie, others widened there."""
    if kind == 0:
        return numba.carray(_pointer(address + 4 * start), room.size)
    _widen(room, numba.carray(_half_pointer(address + 2 * start), room.size))
    return room


@compiled(types.void(_ROW, _ROW, _ROW, types.float32))
def _add_change(total: Any, row: Any, base: Any, weight: Any) -> None:
    for i in range(total.size):
        total[i] = total[i] + weight * (row[i] - base[i])


@compiled(types.void(types.int64[::1], types.int64[::1], _ROW), nogil=True)
def _difference(addresses: Any, kinds: Any, out: Any) -> None:
    other = np.empty(BLOCK, np.float32)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        _load(out[start:stop], addresses[0], kinds[0], start)
        _load(other[: stop - start], addresses[1], kinds[1], start)
        _subtract(out[start:stop], other[: stop - start])


@compiled(types.void(types.int64, types.int64, types.int64, _ROW, _ROW, _ROW, types.float64[::1]))
def _store(out: int, kind: int, start: int, total: Any, base: Any, scratch: Any, sums: Any) -> None:
    """Store a block from ``start`` of the array of bf16 numbers at ``out``; fp32 lies there.

    Adds what rounding lost, and the change, to ``sums``.
    """
    if kind == 0:
        return
    stored = numba.carray(_half_pointer(out + 2 * start), total.size)
    _narrow(stored, total)
    _widen(scratch, stored)
    _subtract(scratch, total)
    sums[0] += np.dot(scratch, scratch)
    _subtract(total, base)
    sums[1] += np.dot(total, total)


@compiled(
    types.void(
        types.int64[::1],
        types.int64[::1],
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int64, 1, "C", readonly=True),
        types.boolean,
        types.int64,
        types.int64,
        types.float64[::1],
    ),
    nogil=True,
)
def _merge(
    addresses: Any,
    kinds: Any,
    weights: Any,
    boundaries: Any,
    delta: bool,
    out: int,
    out_kind: int,
    sums: Any,
) -> None:
    """Write the weighted sum of sources, base first, into ``out``.

    Adds what rounding lost, and the change, to ``sums``.
    """
    scratch = np.empty((3, BLOCK), np.float32)
    for segment in range(boundaries.size - 1):
        for start in range(boundaries[segment], boundaries[segment + 1], BLOCK):
            n = min(start + BLOCK, boundaries[segment + 1]) - start
            base = _row_of(addresses[0], kinds[0], start, scratch[0, :n])
            total = scratch[2, :n]
            if out_kind == 0:
                total = numba.carray(_pointer(out + 4 * start), n)
            empty = True
            for t in range(addresses.size):
                weight = weights[t, segment]
                if weight == 0:
                    continue
                row = base if t == 0 else _row_of(addresses[t], kinds[t], start, scratch[1, :n])
                if delta and t > 0:
                    if empty:
                        total[:] = 0
                    _add_change(total, row, base, weight)
                elif empty:
                    _set1(total, row, weight)
                else:
                    _add1(total, row, weight)
                empty = False
            if empty:
                total[:] = 0
            _store(out, out_kind, start, total, base, scratch[1, :n], sums)


def difference(one: Any, other: Any, out: npt.NDArray[np.float32]) -> None:
    """``out = one − other``, all contiguous ``(n,)``.

    The two are fp32, or bf16 as its bits in uint16.
    """
    _difference(*addresses_of([one, other]), out)


def merge_sources(
    sources: Sequence[Any],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    delta: bool,
    out: Any,
) -> tuple[float, float]:
    """Write the weighted sum of sources into ``out``.

    Args:
        sources: Base and experts, each contiguous ``(n,)``: fp32, or bf16 as its bits in uint16.
        weights: ``(sources, segments)``.
        boundaries: ``(segments + 1,)``.
        delta: Whether the terms after the first are differences from the first.
        out: ``(n,)``, fp32 or bf16.

    Returns:
        Σ (stored − merged)² and Σ (merged − base)²; both 0 for fp32, where nothing is lost.
    """
    sums = np.zeros(2)
    (target,), (kind,) = addresses_of([out])
    _merge(*addresses_of(sources), weights, boundaries, delta, int(target), int(kind), sums)
    return float(sums[0]), float(sums[1])


def addresses_of(arrays: Sequence[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where arrays lie, and what they hold: 0 for fp32, 1 for bf16 as its bits in uint16."""
    addresses = np.array([array.ctypes.data for array in arrays], dtype=np.int64)
    kinds = np.array(
        [_BF16 if array.dtype == np.uint16 else _FP32 for array in arrays], dtype=np.int64
    )
    return addresses, kinds
