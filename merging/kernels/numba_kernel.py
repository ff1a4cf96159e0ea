"""``combine`` compiled by numba, for contiguous fp32 in main memory.

One compiled function serves any K and any number of separate rows: it receives addresses. Threads
are ordinary Python threads that leave the interpreter lock, so there is no numba threading layer
that a fork could break.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import event
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from mergesearch.merging.kernels.forms import ELECTIONS

#: Elements per inner loop: six streams of 4 kB stay in the first-level cache, where `out` waits for
#: its next terms.
BLOCK = 1024

#: The same where terms are not all read side by side, as a base and four rows are. A processor
#: fetches ahead of a row only once it has followed it for a while, which takes most of 4 kB: a byte
#: of 16 rows took twice as long as one of four. Visits of 64 kB are worth that ``out`` waits in the
#: second-level cache.
LONG_BLOCK = 1 << 14
SIDE_BY_SIDE = 5

#: Shortest stretch worth a thread (1 MB per stream), and stretches per thread so that a slow core
#: delays little.
SHORTEST_TASK = 1 << 18
TASKS_PER_THREAD = 4

#: Said once, where numba's cache has no kernels for this processor and installation.
COMPILING = "mergesearch: compiling kernels for this processor; later runs take them from a cache"

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

    With an election, the terms after the first are elected instead of summed
    (:data:`mergesearch.merging.kernels.Election`).
    """
    addresses = np.array([term.ctypes.data for term in terms], dtype=np.int64)
    rule = ("", *ELECTIONS).index(election)

    def stretch(limits: tuple[int, int]) -> None:
        _combine(addresses, weights, boundaries, out, *limits, rule)

    tasks = stretches(out.size, threads)
    if len(tasks) == 1:
        stretch(tasks[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, tasks))


def stretches(size: int, threads: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut ``0..size`` into stretches for the threads, which start at multiples of ``multiple``."""
    if threads <= 1:
        return [(0, size)]
    least = max(SHORTEST_TASK, -(-size // (threads * TASKS_PER_THREAD)))
    step = -(-least // multiple) * multiple
    return [(start, min(start + step, size)) for start in range(0, size, step)]


class _Compiling(event.Listener):  # type: ignore[misc]  # numba has no types
    """Says at a terminal why the first run waits; loads from numba's cache are no compilation."""

    def __init__(self) -> None:
        self._told = False

    def on_start(self, event: object) -> None:
        """Say it before the first kernel."""
        if not self._told and sys.stderr.isatty():
            print(COMPILING, file=sys.stderr, flush=True)
        self._told = True

    def on_end(self, event: object) -> None:
        """Say nothing after it."""


event.register("numba:compile", _Compiling())


def compiled(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit``, with its compile cache where some folder for it is writable.

    The function is compiled, or taken from the cache, when it is first called: a study uses few of
    the kernels that its modules have, and to load one takes about 10 ms.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            # numba: "no locator available": neither the package nor the user's folder is writable
            kernel = numba.njit(**options)(function)
        _compile_at_first_use(kernel, signature)
        return kernel

    return decorate


def _compile_at_first_use(kernel: Any, signature: Any) -> None:
    """Let a kernel compile itself for its signatures, and for no others, at its first use.

    Numba has two ways into a kernel without compiled code, both named here: a call from Python, and
    the compilation of a kernel that calls it.
    """
    template = kernel.get_call_template

    def compiled_kernel(*_arguments: Any) -> Any:
        with global_compiler_lock:
            if not kernel.overloads:
                for each in signature if isinstance(signature, list) else [signature]:
                    kernel.compile(each)
                kernel.disable_compile()
        return kernel  # numba calls what it receives with the same arguments

    def call_template(arguments: Any, options: Any) -> Any:
        compiled_kernel()
        return template(arguments, options)

    kernel._compile_for_args = compiled_kernel
    kernel.get_call_template = call_template


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_typing_context: Any, _address: Any) -> Any:
    """The address, an int64, as a pointer to fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


# Every term is one multiplication and one addition, in order: numba does not fuse them unless asked
# (fastmath). Four terms at a time, because loading and storing `out` once per term costs a quarter
# of the bandwidth.
_READ = types.Array(types.float32, 1, "C", readonly=True)
_WRITE = types.Array(types.float32, 1, "C")
_FP32 = types.float32


@compiled(types.void(_WRITE, _READ, _FP32))
def _set1(out: Floats, a: Floats, wa: float) -> None:
    for i in range(out.size):
        out[i] = wa * a[i]


@compiled(types.void(_WRITE, _READ, _FP32))
def _add1(out: Floats, a: Floats, wa: float) -> None:
    for i in range(out.size):
        out[i] = out[i] + wa * a[i]


@compiled(types.void(_WRITE, _READ, _READ, _FP32, _FP32))
def _add2(out: Floats, a: Floats, b: Floats, wa: float, wb: float) -> None:
    for i in range(out.size):
        out[i] = (out[i] + wa * a[i]) + wb * b[i]


@compiled(types.void(_WRITE, _READ, _READ, _READ, _READ, _FP32, _FP32, _FP32, _FP32))
def _add4(
    out: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats,
    wa: float,
    wb: float,
    wc: float,
    wd: float,
) -> None:
    for i in range(out.size):
        out[i] = (((out[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@compiled(types.void(_WRITE, types.int64[::1], _FP32[::1], types.int64))
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


# Elections work on magnitudes along the elected sign (1, -1 or 0), which leaves no branch that
# would keep the compiler from vector instructions: a term agrees where its product with the sign is
# positive.
_ROW = types.Array(types.float32, 1, "C")


@compiled(types.void(_ROW, _READ, _READ, _FP32, _FP32, _ROW))
def _elect_sum(kept: Floats, a: Floats, b: Floats, wa: float, wb: float, sign: Floats) -> None:
    for i in range(kept.size):
        one = (wa * a[i]) * sign[i]
        other = (wb * b[i]) * sign[i]
        partial = kept[i] + (one if one > 0 else np.float32(0))
        kept[i] = partial + (other if other > 0 else np.float32(0))


@compiled(types.void(_ROW, _READ, _READ, _FP32, _FP32, _ROW))
def _elect_max(kept: Floats, a: Floats, b: Floats, wa: float, wb: float, sign: Floats) -> None:
    for i in range(kept.size):
        one = (wa * a[i]) * sign[i]
        other = (wb * b[i]) * sign[i]
        least = kept[i]
        larger = one if one > least else least
        kept[i] = other if other > larger else larger


@compiled(types.void(_ROW, _ROW, _READ, _READ, _FP32, _FP32, _FP32, _FP32, _ROW))
def _elect_mean(
    kept: Floats,
    count: Floats,
    a: Floats,
    b: Floats,
    wa: float,
    wb: float,
    na: float,
    nb: float,
    sign: Floats,
) -> None:
    for i in range(kept.size):
        one = (wa * a[i]) * sign[i]
        other = (wb * b[i]) * sign[i]
        partial = kept[i] + (one if one > 0 else np.float32(0))
        kept[i] = partial + (other if other > 0 else np.float32(0))
        number = count[i] + (na if one > 0 else np.float32(0))
        count[i] = number + (nb if other > 0 else np.float32(0))


@compiled(types.void(_ROW, _ROW, _ROW))
def _start_election(total: Floats, kept: Floats, count: Floats) -> None:
    """Turn the sums of the terms into signs (NaN where a sum is not finite) and clear the rest."""
    for i in range(total.size):
        value = total[i]
        unit = np.float32(1) if value > 0 else np.float32(0)
        unit = np.float32(-1) if value < 0 else unit
        total[i] = unit + np.float32(0) * value
        kept[i] = np.float32(0)
        count[i] = np.float32(0)


@compiled(types.void(_WRITE, _READ, _ROW, _ROW, _ROW))
def _finish_election(out: Floats, base: Floats, kept: Floats, sign: Floats, count: Floats) -> None:
    """``out = base + sign · kept / count``.

    A sign that is not a number says that the terms' sum was not finite.
    """
    for i in range(out.size):
        divisor = count[i] if count[i] > 0 else np.float32(1)
        out[i] = base[i] + sign[i] * (kept[i] / divisor)


_FOUR = types.UniTuple(_FP32, 4)


@compiled(types.void(_WRITE, _READ, _READ, _READ, _READ, _READ, _FOUR, _FOUR, types.boolean))
def _elect_four(
    out: Floats,
    base: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats,
    w: Any,
    size: Any,
    divide: bool,
) -> None:
    """An election of up to four terms in one pass, for the rules that add.

    The same operations in the same order as for many terms.
    """
    zero = np.float32(0)
    one = np.float32(1)
    wa, wb, wc, wd = w
    na, nb, nc, nd = size
    for i in range(out.size):
        va = wa * a[i]
        vb = wb * b[i]
        vc = wc * c[i]
        vd = wd * d[i]
        total = ((va + vb) + vc) + vd
        sign = one if total > 0 else zero
        sign = (-one if total < 0 else sign) + zero * total
        va = va * sign
        vb = vb * sign
        vc = vc * sign
        vd = vd * sign
        kept = va if va > 0 else zero
        kept = kept + (vb if vb > 0 else zero)
        kept = kept + (vc if vc > 0 else zero)
        kept = kept + (vd if vd > 0 else zero)
        count = na if va > 0 else zero
        count = count + (nb if vb > 0 else zero)
        count = count + (nc if vc > 0 else zero)
        count = count + (nd if vd > 0 else zero)
        divisor = count if divide and count > 0 else one
        out[i] = base[i] + sign * (kept / divisor)


@compiled(types.void(_WRITE, types.int64[::1], _FP32[::1], types.int64, types.int64, _FP32[:, ::1]))
def _elect_block(
    out: Floats, addresses: Any, weights: Floats, count: int, rule: int, scratch: Floats
) -> None:
    """``out = base + elected(terms)``: the first term is the base, with weight 1."""
    n = out.size
    sign = scratch[0, :n]
    kept = scratch[1, :n]
    number = scratch[2, :n]
    base = numba.carray(_pointer(addresses[0]), n)
    if count == 1:
        out[:] = base
        return
    if count <= 5 and rule != 4:
        four_rows = np.empty(4, np.int64)
        four = np.zeros(4, np.float32)
        sizes = np.ones(4, np.float32)
        for t in range(4):
            four_rows[t] = addresses[t + 1] if t + 1 < count else addresses[1]
            four[t] = weights[t + 1] if t + 1 < count else np.float32(0)
            sizes[t] = abs(four[t]) if rule == 3 else np.float32(1)
        a = numba.carray(_pointer(four_rows[0]), n)
        b = numba.carray(_pointer(four_rows[1]), n)
        c = numba.carray(_pointer(four_rows[2]), n)
        d = numba.carray(_pointer(four_rows[3]), n)
        w = (four[0], four[1], four[2], four[3])
        size = (sizes[0], sizes[1], sizes[2], sizes[3])
        _elect_four(out, base, a, b, c, d, w, size, rule != 1)
        return
    _sum_block(sign, addresses[1:], weights[1:], count - 1)
    _start_election(sign, kept, number)
    for t in range(1, count, 2):
        last = t + 1 == count  # an odd one out is paired with itself, at weight 0
        u = t if last else t + 1
        a = numba.carray(_pointer(addresses[t]), n)
        wa = weights[t]
        b = numba.carray(_pointer(addresses[u]), n)
        wb = np.float32(0) if last else weights[u]
        if rule == 1:
            _elect_sum(kept, a, b, wa, wb, sign)
        elif rule == 4:
            _elect_max(kept, a, b, wa, wb, sign)
        else:
            na = np.float32(abs(wa)) if rule == 3 else np.float32(1)
            nb = np.float32(abs(wb)) if rule == 3 else np.float32(1)
            _elect_mean(kept, number, a, b, wa, wb, na, nb, sign)
    _finish_election(out, base, kept, sign, number)


@compiled(
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
def _combine(
    addresses: Any, weights: Floats, boundaries: Any, out: Floats, start: int, stop: int, rule: int
) -> None:
    """The stretch ``start:stop`` of the sum, segment by segment, block by block."""
    terms = addresses.size
    most = LONG_BLOCK if terms > SIDE_BY_SIDE else BLOCK
    scratch = np.empty((3, most if rule != 0 else 0), np.float32)
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
        length = LONG_BLOCK if count > SIDE_BY_SIDE else BLOCK
        while start < end:
            block = min(start + length, end)
            for t in range(count):
                block_addresses[t] = used_addresses[t] + 4 * start
            if rule == 0:
                _sum_block(out[start:block], block_addresses, used_weights, count)
            else:
                _elect_block(out[start:block], block_addresses, used_weights, count, rule, scratch)
            start = block
        segment += 1
