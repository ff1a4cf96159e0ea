"""Random bits and masks of whole ranges, compiled: those of :mod:`.philox`, chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from mergesearch.merging.kernels.chunks.columns import CHUNK, Code, keep
from mergesearch.merging.kernels.chunks.narrow import LANES
from mergesearch.merging.kernels.chunks.philox import COUNTERS, random_bits
from mergesearch.merging.kernels.chunks.stamp import stamped
from mergesearch.merging.kernels.numba_kernel import compiled

#: Elements whose bits lie in the first-level cache at once.
BLOCK = 1024

_BITS = types.Array(types.uint32, 1, "C")
_MASK = types.Array(types.uint8, 1, "C")


@intrinsic  # type: ignore[untyped-decorator]
def _draw_chunk(_typing: Any, _one: Any, _other: Any, _counter: Any, _out: Any) -> Any:
    """Write the bits of a chunk to an address, an int64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        one, other, counter, out = arguments
        code = Code(builder, pairs=False)
        for v, bits in enumerate(random_bits(builder, (one, other), counter)):
            keep(code, out, bits, 4 * LANES * v)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@compiled(types.void(types.int64, types.int64, types.int64, _BITS), nogil=True)
@stamped
def _fill(one: int, other: int, counter: int, out: Any) -> None:
    whole = out.size // CHUNK
    for chunk in range(whole):
        _draw_chunk(one, other, counter + chunk * COUNTERS, out.ctypes.data + chunk * CHUNK * 4)
    rest = out.size - whole * CHUNK
    if rest > 0:
        part = np.empty(CHUNK, np.uint32)
        _draw_chunk(one, other, counter + whole * COUNTERS, part.ctypes.data)
        out[whole * CHUNK :] = part[:rest]


@compiled(types.void(_BITS, types.uint32, _MASK))
def _below(bits: Any, chance: int, out: Any) -> None:
    for i in range(out.size):
        out[i] = np.uint8(1) if bits[i] < chance else np.uint8(0)


@compiled(types.void(types.int64, types.int64, types.uint32, _MASK), nogil=True)
@stamped
def _mask(one: int, other: int, chance: int, out: Any) -> None:
    part = np.empty(BLOCK, np.uint32)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        _fill(one, other, start // 8, part)
        _below(part, chance, out[start:stop])


def draw_bits(key: int, counter: int, size: int) -> npt.NDArray[np.uint32]:
    """The bits of ``size`` elements, those of eight to a counter.

    Args:
        key: 128 bits, as ``numpy.random.Philox`` takes them.
        counter: The first counter.
        size: Number of elements.
    """
    bits = np.empty(size, np.uint32)
    _fill(*key_words(key), counter, bits)
    return bits


def draw_mask(key: int, chance: int, mask: npt.NDArray[np.uint8]) -> None:
    """Write 1 where an element's bits are below ``chance``, at most 2³² − 1, and else 0."""
    _mask(*key_words(key), np.uint32(chance), mask)


def key_words(key: int) -> tuple[int, int]:
    """The two words of a key of 128 bits, as signed integers."""
    one, other = np.array([key & 0xFFFFFFFFFFFFFFFF, key >> 64], np.uint64).view(np.int64)
    return int(one), int(other)
