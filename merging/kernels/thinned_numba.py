"""TIES and DARE in one pass over weights as they are stored, fp32 or bf16.

Difference, thinning, election and sum are the same operations in the same order as on prepared
rows, so the same bits, without making the rows. Task vectors that were thinned before are elected
and summed in the same pass. Positions whose terms cancel take the sign that most positions of the
model have. Where that is not known yet, they are written for a guess, and what differs for the
other sign is returned, to be written over them later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.chunks.columns import CHUNK
from mergesearch.merging.kernels.chunks.draws import key_words
from mergesearch.merging.kernels.chunks.narrow import LANES
from mergesearch.merging.kernels.chunks.patches import PATCHES, note_patches, ones
from mergesearch.merging.kernels.chunks.philox import COUNTERS
from mergesearch.merging.kernels.chunks.ranges import copy_bytes
from mergesearch.merging.kernels.chunks.stamp import stamped
from mergesearch.merging.kernels.chunks.terms import (
    ADDRESS,
    CHANCE,
    CHANGE_AT,
    DRAWN,
    FACTOR,
    IS_CHANGE,
    KEY,
    KIND,
    LIMIT,
    LOST_AT,
    ODD_AT,
    OTHER_KEY,
    SUM_ALL,
    TERM_FIELDS,
    TERMS_AT,
    VOTES,
)
from mergesearch.merging.kernels.chunks.thinning import thin_chunk
from mergesearch.merging.kernels.forms import KEEP_ALL, Patches, Thinning
from mergesearch.merging.kernels.numba_kernel import compiled
from mergesearch.merging.kernels.source_numba import bits_of

#: Rules by number: no election, then those of :mod:`.sparse_numba`.
RULES = ("", "mean", "sum", "max")

#: Of how many positions of a tensor one may be patched.
PATCHED = 16

#: Chunks whose squares are summed in fp32, as in blocks of other kernels.
_TOGETHER = 16
#: fp32 bits of infinity.
_INFINITY = 0x7F800000

_AT = types.int64
_TERMS = types.Array(types.int64, 2, "C")
_ROOM = types.Array(types.float32, 1, "C")
_LIST = types.Array(types.int64, 1, "C")
_WEIGHTS = types.Array(types.float32, 1, "C")
#: First and last of some chunks, and how many lie before the memory.
_PART = types.UniTuple(types.int64, 3)
#: Address of a result, 0 for none, and the kind of its numbers.
_TARGET = types.UniTuple(types.int64, 2)
_SUMS = types.Array(types.float64, 1, "C")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a merge found.

    Attributes:
        finite: Whether all changes are finite; nothing else holds where they are not.
        cancelled: Positions where terms that are not 0 cancel exactly.
        balance: Positions whose terms sum to more than 0, minus those below 0.
        lost: Σ (stored − merged)².
        change: Σ (merged − base)².
        patches: What to write where the majority's sign is the other one; None unless it was asked
            for, or where it would be too much.
    """

    finite: bool
    cancelled: int
    balance: int
    lost: float
    change: float
    patches: Patches | None = None


@compiled(types.void(_ROOM, _SUMS))
def _take_sums(room: Any, sums: Any) -> None:
    """Move the squares of a block to the sums."""
    for lane in range(LANES):
        sums[0] += room[LOST_AT + lane]
        sums[1] += room[CHANGE_AT + lane]
        room[LOST_AT + lane] = np.float32(0)
        room[CHANGE_AT + lane] = np.float32(0)


@compiled(types.boolean(_ROOM))
def _is_odd(room: Any) -> Any:
    """Whether some change was not finite."""
    odd = 0
    for lane in range(LANES):
        odd += bits_of(room[ODD_AT + lane]) >= np.uint32(_INFINITY)
    return odd > 0


@compiled(types.void(_TERMS, _AT, _AT, _AT, _TERMS, types.Array(types.uint8, 1, "C")))
def _pad_terms(terms: Any, start: int, low: int, high: int, padded: Any, pad: Any) -> None:
    """Copy positions ``start + low`` to ``start + high`` of every term to ``pad``, with zeros
    around them, and make ``padded`` terms that read the copy."""
    pad[:] = 0
    at = pad.ctypes.data
    for t in range(terms.shape[0]):
        padded[t] = terms[t]
        size = 4 if terms[t, KIND] == 0 else 2
        origin = terms[t, ADDRESS] + (start + low) * size
        copy_bytes(at + low * size, origin, (high - low) * size)
        padded[t, ADDRESS] = at
        at += 4 * CHUNK


@compiled(
    types.void(
        *(_TERMS, _WEIGHTS, _PART, _AT, types.float32, _TARGET, _ROOM, PATCHES, _LIST, _SUMS)
    )
)
@stamped
def _merge_chunks(
    terms: Any,
    weights: Any,
    part: Any,
    rule: int,
    majority: Any,
    target: Any,
    room: Any,
    patches: Any,
    found: Any,
    sums: Any,
) -> None:
    """Merge whole chunks, and note what they find.

    ``part`` is (first, last, how many chunks lie before the memory of terms and target), ``target``
    the address and the kind of the result.
    """
    first, last, before = part
    out, kind = target
    count = terms.shape[0] - 1
    votes = np.zeros(VOTES, np.int64)
    sign = np.int64(bits_of(majority))
    for chunk in range(first, last):
        thin_chunk(
            terms.ctypes.data,
            weights.ctypes.data,
            count,
            chunk - before,
            chunk * COUNTERS,
            rule,
            sign,
            out,
            kind,
            room.ctypes.data,
            votes.ctypes.data,
        )
        if rule != SUM_ALL:
            found[0] += ones(votes[0])
            found[1] += votes[1]
            if votes[0] != 0 and found[2] >= 0 and patches[0].size > 0:
                how = (rule, kind, found[2])
                start = chunk * CHUNK
                found[2] = note_patches(
                    room, count, votes[0], start, how, majority, weights, patches, sums
                )
        if chunk % _TOGETHER == 0:
            _take_sums(room, sums)
    _take_sums(room, sums)


@compiled(
    types.boolean(
        _TERMS,
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int64, 1, "C", readonly=True),
        _AT,
        types.float32,
        _TARGET,
        PATCHES,
        _LIST,
        _SUMS,
    ),
    nogil=True,
)
@stamped
def _merge(
    terms: Any,
    weights: Any,
    boundaries: Any,
    rule: int,
    majority: Any,
    target: Any,
    patches: Any,
    found: Any,
    sums: Any,
) -> Any:
    """:func:`merge_thinned`; ``found`` becomes (cancelled, balance, patches or −1).

    Whole chunks are merged in place, ends of segments in a copy. Returns whether everything is
    finite.
    """
    count = terms.shape[0] - 1
    padded = np.empty_like(terms)
    pad = np.empty((count + 1) * 4 * CHUNK, np.uint8)
    result = np.empty(CHUNK, np.float32)
    room = np.zeros(TERMS_AT + count * CHUNK, np.float32)
    here = np.empty(count, np.float32)
    out, kind = target
    size = 4 if kind == 0 else 2
    for segment in range(boundaries.size - 1):
        here[:] = weights[1:, segment]
        start = boundaries[segment]
        end = boundaries[segment + 1]
        while start < end:
            chunk = start // CHUNK
            low = start - chunk * CHUNK
            if low == 0 and end - start >= CHUNK:
                part = (chunk, end // CHUNK, 0)
                _merge_chunks(terms, here, part, rule, majority, target, room, patches, found, sums)
                start = end // CHUNK * CHUNK
                continue
            high = min(CHUNK, end - chunk * CHUNK)
            _pad_terms(terms, chunk * CHUNK, low, high, padded, pad)
            part = (chunk, chunk + 1, chunk)
            copy = (result.ctypes.data if out != 0 else 0, kind)
            _merge_chunks(padded, here, part, rule, majority, copy, room, patches, found, sums)
            if out != 0:
                origin = result.ctypes.data + low * size
                copy_bytes(out + start * size, origin, (high - low) * size)
            start = chunk * CHUNK + high
    return not _is_odd(room)


def merge_thinned(
    sources: Sequence[Any],
    thinnings: Sequence[Thinning],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    rule: str,
    majority: int,
    out: Any,
    notes: bool = False,
) -> Outcome:
    """Write base + Σ c_k elected_k into ``out``, in the frozen mode of TIES; or base + Σ c_k x_k.

    Args:
        sources: Base and experts, each contiguous ``(n,)``: fp32, or bf16 as its bits in uint16;
            in the place of an expert its task vector, where the thinning says so.
        thinnings: What becomes of every expert's task vector.
        weights: ``(1 + experts, segments)``, 1 for the base.
        boundaries: ``(segments + 1,)``.
        rule: ``mean``, ``sum`` or ``max``; empty to elect nothing.
        majority: The sign taken where terms cancel exactly: 1, −1, or 0 for none.
        out: ``(n,)``, fp32 or bf16.
        notes: Whether to return patches for the other sign.
    """
    patches = _no_patches(out.size // PATCHED + 1 if notes else 0)
    found, sums, finite = _run(
        sources, thinnings, weights, boundaries, rule, majority, out, patches
    )
    noted = None
    if notes and found[2] >= 0:
        positions = patches[0][: found[2]].copy()
        bits = patches[1][: found[2]].copy()
        numbers = bits.view(np.float32) if out.dtype == np.float32 else bits.astype(np.uint16)
        noted = Patches(positions, numbers, float(sums[2]), float(sums[3]))
    return Outcome(finite, int(found[0]), int(found[1]), float(sums[0]), float(sums[1]), noted)


def balance_thinned(sources: Sequence[Any], thinnings: Sequence[Thinning]) -> int | None:
    """Positions whose thinned differences sum to more than 0, minus those below 0.

    None where a difference is not finite.
    """
    weights = np.ones((len(sources), 1), np.float32)
    boundaries = np.array([0, sources[0].size])
    found, _, finite = _run(sources, thinnings, weights, boundaries, "sum", 1, None, _no_patches(0))
    return int(found[1]) if finite else None


def _no_patches(room: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    return np.empty(room, np.int64), np.empty(room, np.uint32)


def _run(
    sources: Sequence[Any],
    thinnings: Sequence[Thinning],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    rule: str,
    majority: int,
    out: Any,
    patches: tuple[Any, Any],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], bool]:
    """(cancelled, balance, patches), the sums, and whether all changes are finite."""
    found = np.zeros(3, np.int64)
    sums = np.zeros(4)
    target = (0, 0) if out is None else (out.ctypes.data, int(out.dtype == np.uint16))
    sign = np.float32(majority)
    terms = _terms(sources, thinnings)
    number = RULES.index(rule)
    finite = _merge(terms, weights, boundaries, number, sign, target, patches, found, sums)
    return found, sums, bool(finite)


def _terms(sources: Sequence[Any], thinnings: Sequence[Thinning]) -> npt.NDArray[np.int64]:
    """Base and experts as the chunk's code reads them."""
    terms = np.zeros((len(sources), TERM_FIELDS), np.int64)
    for term, source, thinning in zip(terms, sources, (KEEP_ALL, *thinnings), strict=True):
        term[KIND] = source.dtype == np.uint16
        term[ADDRESS] = source.ctypes.data
        factor, limit = np.array([thinning.factor, thinning.limit], np.float32).view(np.uint32)
        term[FACTOR] = factor
        term[LIMIT] = limit
        term[IS_CHANGE] = thinning.made
        if thinning.key is not None:
            term[DRAWN] = 1
            term[CHANCE] = thinning.chance
            term[KEY], term[OTHER_KEY] = key_words(thinning.key)
    return terms
