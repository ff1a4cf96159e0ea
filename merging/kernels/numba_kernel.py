"""``combine`` compiled by numba, for contiguous fp32 in main memory.

One compiled function serves any K and any number of separate rows: it receives addresses. Threads are ordinary
Python threads that leave the interpreter lock, so there is no numba threading layer that a fork could break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from merging.kernels import ELECTIONS

#: Elements per inner loop: six streams of 4 kB stay in the first-level cache, where `out` waits for its next terms.
BLOCK = 1024

#: Shortest stretch worth a thread (1 MB per stream), and stretches per thread so that a slow core delays little.
SHORTEST_TASK = 1 << 18
TASKS_PER_THREAD = 4

Floats = npt.NDArray[np.float32]


def combine(
    terms: Sequence[Floats],
    weights: Floats,
    boundaries: npt.NDArray[np.int64],
    out: Floats,
    threads: int,
    election: str = "",
) -> None:
    """Write ``Σ_t weights[t] · terms[t]`` into ``out`` ``(n,)``; weights are ``(terms, segments)``.

    With an election, the terms after the first are elected instead of summed (:data:`merging.kernels.Election`).
    """
    addresses = np.array([term.ctypes.data for term in terms], dtype=np.int64)
    rule = ("", *ELECTIONS).index(election)

    def stretch(limits: tuple[int, int]) -> None:
        _combine(addresses, weights, boundaries, out, *limits, rule)

    tasks = _tasks(out.size, threads)
    if len(tasks) == 1:
        stretch(tasks[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, tasks))


def _tasks(size: int, threads: int) -> list[tuple[int, int]]:
    """Cut ``0..size`` into stretches for the threads."""
    if threads <= 1:
        return [(0, size)]
    step = max(SHORTEST_TASK, -(-size // (threads * TASKS_PER_THREAD)))
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _compile(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with its compile cache where some folder for it is writable, without it elsewhere."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available": neither the package nor the user's folder is writable
            return numba.njit(signature, **options)(function)

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_typing_context: Any, _address: Any) -> Any:
    """The address, an int64, as a pointer to fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


# Every term is one multiplication and one addition, in order: numba does not fuse them unless asked (fastmath).
# Four terms at a time, because loading and storing `out` once per term costs a quarter of the bandwidth.
_READ = types.Array(types.float32, 1, "C", readonly=True)
_WRITE = types.Array(types.float32, 1, "C")
_FP32 = types.float32


@_compile(types.void(_WRITE, _READ, _FP32))
def _set1(out: Floats, a: Floats, wa: float) -> None:
    for i in range(out.size):
        out[i] = wa * a[i]


@_compile(types.void(_WRITE, _READ, _FP32))
def _add1(out: Floats, a: Floats, wa: float) -> None:
    for i in range(out.size):
        out[i] = out[i] + wa * a[i]


@_compile(types.void(_WRITE, _READ, _READ, _FP32, _FP32))
def _add2(out: Floats, a: Floats, b: Floats, wa: float, wb: float) -> None:
    for i in range(out.size):
        out[i] = (out[i] + wa * a[i]) + wb * b[i]


@_compile(types.void(_WRITE, _READ, _READ, _READ, _READ, _FP32, _FP32, _FP32, _FP32))
def _add4(out: Floats, a: Floats, b: Floats, c: Floats, d: Floats, wa: float, wb: float, wc: float, wd: float) -> None:
    for i in range(out.size):
        out[i] = (((out[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@_compile(types.void(_WRITE, types.int64[::1], _FP32[::1], types.int64))
def _sum_block(out: Floats, addresses: Any, weights: Floats, count: int) -> None:
    """``out = Σ weights[t] · (floats at addresses[t])`` over the first ``count`` terms."""
    n = out.size
    if count == 0:
        out[:] = 0
        return
    _set1(out, numba.carray(_pointer(addresses[0]), n), weights[0])
    t = 1
    while t + 4 <= count:
        a = numba.carray(_pointer(addresses[t]), n)
        b = numba.carray(_pointer(addresses[t + 1]), n)
        c = numba.carray(_pointer(addresses[t + 2]), n)
        d = numba.carray(_pointer(addresses[t + 3]), n)
        _add4(out, a, b, c, d, weights[t], weights[t + 1], weights[t + 2], weights[t + 3])
        t += 4
    if t + 2 <= count:
        a = numba.carray(_pointer(addresses[t]), n)
        b = numba.carray(_pointer(addresses[t + 1]), n)
        _add2(out, a, b, weights[t], weights[t + 1])
        t += 2
    if t < count:
        _add1(out, numba.carray(_pointer(addresses[t]), n), weights[t])


@_compile(types.void(_WRITE, _READ, _FP32, _FP32[::1], types.int64, _FP32[::1]))
def _elect_term(kept: Floats, row: Floats, weight: float, total: Floats, rule: int, count: Floats) -> None:
    """Add one term to ``kept`` and ``count`` where it has the sign of ``total``."""
    size = np.float32(abs(weight)) if rule == 3 else np.float32(1)
    zero = np.float32(0)
    if rule == 4:
        for i in range(kept.size):
            term = weight * row[i]
            agrees = (term > 0 and total[i] > 0) or (term < 0 and total[i] < 0)
            kept[i] = term if agrees and abs(term) > abs(kept[i]) else kept[i]
        return
    for i in range(kept.size):
        term = weight * row[i]
        agrees = (term > 0 and total[i] > 0) or (term < 0 and total[i] < 0)
        kept[i] = kept[i] + (term if agrees else zero)
        count[i] = count[i] + (size if agrees else zero)


@_compile(types.void(_WRITE, types.int64[::1], _FP32[::1], types.int64, types.int64, _FP32[:, ::1]))
def _elect_block(out: Floats, addresses: Any, weights: Floats, count: int, rule: int, scratch: Floats) -> None:
    """``out = base + elected(terms)``: the first term is the base, with weight 1."""
    n = out.size
    total, kept, number = scratch[0, :n], scratch[1, :n], scratch[2, :n]
    base = numba.carray(_pointer(addresses[0]), n)
    if count == 1:
        out[:] = base
        return
    kept[:] = 0
    number[:] = 0
    _sum_block(total, addresses[1:], weights[1:], count - 1)
    for t in range(1, count):
        _elect_term(kept, numba.carray(_pointer(addresses[t]), n), weights[t], total, rule, number)
    for i in range(n):
        divisor = number[i] if (rule == 2 or rule == 3) and number[i] > 0 else np.float32(1)
        elected = kept[i] / divisor
        out[i] = base[i] + (elected if np.isfinite(total[i]) else np.float32(np.nan))


@_compile(
    types.void(
        types.Array(types.int64, 1, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int64, 1, "C", readonly=True),
        _WRITE,
        types.int64,
        types.int64,
        types.int64,
    ),
    nogil=True,
)
def _combine(addresses: Any, weights: Floats, boundaries: Any, out: Floats, start: int, stop: int, rule: int) -> None:
    """The stretch ``start:stop`` of the sum, segment by segment, block by block."""
    scratch = np.empty((3, BLOCK), np.float32)
    terms = addresses.size
    used_weights = np.empty(terms, np.float32)
    used_addresses = np.empty(terms, np.int64)
    block_addresses = np.empty(terms, np.int64)
    segment = np.searchsorted(boundaries, start, side="right") - 1
    while start < stop:
        end = min(boundaries[segment + 1], stop)
        count = 0
        for t in range(terms):
            if weights[t, segment] != 0:
                used_weights[count] = weights[t, segment]
                used_addresses[count] = addresses[t]
                count += 1
        while start < end:
            block = min(start + BLOCK, end)
            for t in range(count):
                block_addresses[t] = used_addresses[t] + 4 * start
            if rule == 0:
                _sum_block(out[start:block], block_addresses, used_weights, count)
            else:
                _elect_block(out[start:block], block_addresses, used_weights, count, rule, scratch)
            start = block
        segment += 1
