"""Inner products of base and rows over any segments of the flat index.

The rows are read once, in order, and their inner products kept for every chunk of a fixed grid (a
few MB). Those of a segment are the sum of its whole chunks and of the two chunks that its ends cut,
which alone are read again. Sums, not differences of running sums: a small tensor behind a large one
keeps its digits, and what is zero stays zero.

Everything is summed in fp64 and in an order that depends on the positions alone, never on threads
or on what was asked before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.resident.terms import StoredFactors, Terms
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import ALIGNMENT
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.parallel import parallel_map

if TYPE_CHECKING:
    from mergesearch.merging.resident.arena import Arenas

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]

#: ``read(start, stop)``: base and rows at those positions, ``(K + 1, stop - start)``, base first.
Reader = Callable[[int, int], _Wide]

#: Chunks of the grid: few enough to keep, many enough that a cut chunk is soon read again.
CHUNKS = 1 << 16
LARGEST_CHUNK = 1 << 16

#: Positions read at a time while the grid is made: a few rows of them stay in the cache in fp64.
_BLOCK = 1 << 16

#: Pieces of cut chunks that are remembered: those of an archive of fields, several times over.
_REMEMBERED = 1 << 13


class SegmentGram:
    """Inner products of the base and K rows over segments of the flat index.

    Args:
        read: Gives base and rows at positions.
        size: Length of the flat index.
        directions: Number of rows K.
        memo: Keeps the grid's inner products between runs, if given.
        key: What the numbers were made from (JSON-able); without it nothing is kept.
        threads: Blocks that are worked on at once while the grid is made; changes no bit.
    """

    def __init__(
        self,
        read: Reader,
        size: int,
        directions: int,
        *,
        memo: Memo | None = None,
        key: Sequence[Any] = (),
        threads: int = 1,
    ) -> None:
        self._read = read
        self.size = size
        self.directions = directions
        self.chunk = chunk_length(size)
        self._pairs = np.triu_indices(directions + 1)
        self._pieces: OrderedDict[tuple[int, int], _Wide] = OrderedDict()
        self._grid = self._remembered_grid(memo, key, threads)

    @classmethod
    def of(
        cls, arenas: Arenas, *, memo: Memo | None = None, key: Sequence[Any] = (), threads: int = 1
    ) -> SegmentGram:
        """The inner products in an arena.

        A row is what a coefficient of 1 adds to the base, for every form.

        Arenas of the forms ``interpolation`` and ``slerp`` hold experts; their rows are taken minus
        the base.
        """
        read = arena_reader(arenas)
        return cls(
            read, arenas.layout.size, arenas.packing.directions, memo=memo, key=key, threads=threads
        )

    @classmethod
    def of_arrays(cls, base: npt.NDArray[Any], rows: npt.NDArray[Any]) -> SegmentGram:
        """The inner products of base ``(size,)`` and rows ``(K, size)`` in memory, or mapped."""

        def read(start: int, stop: int) -> _Wide:
            return np.concatenate([base[None, start:stop], rows[:, start:stop]]).astype(np.float64)

        return cls(read, int(base.shape[0]), int(rows.shape[0]))

    def gram(self, boundaries: npt.ArrayLike) -> _Wide:
        """Inner products over the segments between boundaries, base first.

        Args:
            boundaries: ``(segments + 1,)``, strictly increasing, within the flat index.

        Returns:
            fp64 ``(segments, K + 1, K + 1)``.

        Raises:
            RecipeError: If the boundaries are not such.
        """
        cuts = np.asarray(boundaries, dtype=np.int64)
        if (
            cuts.ndim != 1
            or cuts.size < 2
            or cuts[0] < 0
            or cuts[-1] > self.size
            or np.any(np.diff(cuts) <= 0)
        ):
            raise RecipeError(
                f"gram: expected increasing boundaries within 0..{self.size}, received "
                f"{cuts.tolist()[:5]}..."
            )
        packed = self._whole_chunks(cuts[:-1], cuts[1:])
        self._add_cut_chunks(packed, cuts)
        first, second = self._pairs
        gram = np.empty((len(packed), self.directions + 1, self.directions + 1))
        gram[:, first, second] = packed
        gram[:, second, first] = packed
        return gram

    def _whole_chunks(self, starts: _Index, stops: _Index) -> _Wide:
        """Sums over the chunks that lie wholly within each segment ``(segments, pairs)``."""
        begin = -(-starts // self.chunk)
        end = stops // self.chunk
        # The end of the flat index ends the last chunk, even where that is shorter.
        end = np.where(stops == self.size, len(self._grid) - 1, end)
        # Pairs of a sum that is wanted and one that is not; a segment without a whole chunk gets a
        # row to be cleared.
        sums = np.add.reduceat(self._grid, np.stack([begin, end], axis=1).ravel())[::2]  # Σ chunks
        sums[begin >= end] = 0.0
        return sums

    def _add_cut_chunks(self, packed: _Wide, cuts: _Index) -> None:
        """Add the parts of chunks that a boundary cuts, to ``packed`` ``(segments, pairs)``."""
        parts = [
            (s, part)
            for s, ends in enumerate(pairwise(cuts.tolist()))
            for part in self._parts(*ends)
        ]
        missing = [part for _, part in parts if part not in self._pieces]
        for part, products in zip(missing, self._products(missing), strict=True):
            self._pieces[part] = products
        for _, part in parts:
            self._pieces.move_to_end(part)
        if parts:
            np.add.at(
                packed, [s for s, _ in parts], np.array([self._pieces[part] for _, part in parts])
            )
        while len(self._pieces) > _REMEMBERED:
            self._pieces.popitem(last=False)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The one or two parts of a segment that are less than a chunk of the grid."""
        chunk = self.chunk
        first = -(-start // chunk) * chunk
        last = stop // chunk * chunk
        if stop == self.size and start <= last:
            last = stop
        if first > last:
            yield start, stop
            return
        if start < first:
            yield start, first
        if last < stop:
            yield last, stop

    def _products(self, parts: Sequence[tuple[int, int]]) -> Iterator[_Wide]:
        """Inner products ``(pairs,)`` of each part, read a few at a time."""
        batch: list[tuple[int, int]] = []
        for part in parts:
            batch.append(part)
            if sum(stop - start for start, stop in batch) >= _BLOCK:
                yield from self._products_of(batch)
                batch = []
        if batch:
            yield from self._products_of(batch)

    def _products_of(self, parts: Sequence[tuple[int, int]]) -> _Wide:
        """Inner products of parts: ``(parts, pairs)``.

        Each part is one sum, whatever lies beside it.
        """
        wide = np.concatenate([self._read(start, stop) for start, stop in parts], axis=1)
        lengths = [stop - start for start, stop in parts]
        starts = np.cumsum([0, *lengths[:-1]])
        products = np.empty((len(parts), self._pairs[0].size))
        pair = 0
        for row in range(len(wide)):
            for other in wide[row:]:
                # Σ_i row_i · other_i of each part, by numpy's own pairwise sums: no library whose
                # order depends on threads or on the machine.
                products[:, pair] = np.add.reduceat(wide[row] * other, starts)
                pair += 1
        return products

    def _remembered_grid(self, memo: Memo | None, key: Sequence[Any], threads: int) -> _Wide:
        if memo is None or not key:
            return self._make_grid(threads)
        import torch

        whole_key = ["segment gram", 1, self.size, self.directions, self.chunk, *key]
        kept = memo.get(whole_key, lambda: {"grid": torch.from_numpy(self._make_grid(threads))})
        grid: _Wide = kept["grid"].numpy()
        return grid

    def _make_grid(self, threads: int) -> _Wide:
        """Inner products of every chunk: ``(chunks + 1, pairs)``.

        The last row is zero; sums may end there.
        """

        def block(start: int) -> _Wide:
            edges = [
                *range(start, min(start + _BLOCK, self.size), self.chunk),
                min(start + _BLOCK, self.size),
            ]
            return self._products_of(list(pairwise(edges)))

        blocks = range(0, self.size, _BLOCK)
        rows = map(block, blocks) if threads <= 1 else parallel_map(block, blocks, threads)
        return np.concatenate([*rows, np.zeros((1, self._pairs[0].size))])


def chunk_length(size: int) -> int:
    """Length of the grid's chunks: a power of two, at most ``LARGEST_CHUNK``.

    The smallest that needs no more than ``CHUNKS`` of them, if there is one.
    """
    length = ALIGNMENT
    while length < LARGEST_CHUNK and size > length * CHUNKS:
        length *= 2
    return length


def arena_reader(arenas: Arenas) -> Reader:
    """A function that reads base and rows of an arena at any positions.

    Rows that are kept as factors are expanded there.
    """
    relative = arenas.form in ("interpolation", "slerp")
    terms = Terms.of(arenas)

    def read(start: int, stop: int) -> _Wide:
        wide = np.zeros((arenas.packing.directions + 1, stop - start))
        wide[0], wide[1:] = terms.read(start, stop)
        for stored in terms.factors:
            low = max(start, stored.spec.start)
            high = min(stop, stored.spec.stop)
            if low < high and stored.owner:
                wide[1:, low - start : high - start] = expand(
                    stored, arenas.packing.directions, low, high
                )
        if relative:
            wide[1:] -= wide[0]
        return wide

    return read


def expand(stored: StoredFactors, directions: int, start: int, stop: int) -> _Wide:
    """The rows of a tensor that is kept as factors, at positions: ``(K, stop - start)``.

    The numbers are those that a merge adds with a coefficient of 1, to the bit.
    """
    from mergesearch.merging.kernels.lowrank import combine_factors

    width = int(stored.right.shape[1])
    first = (start - stored.spec.start) // width
    last = -(-(stop - stored.spec.start) // width)
    left = stored.left[first:last]
    size = (last - first) * width
    skip = start - stored.spec.start - first * width
    zero = np.zeros(size, np.asarray(stored.left).dtype)
    out = np.empty(size, np.asarray(stored.left).dtype)
    rows = np.zeros((directions, stop - start))
    for k in sorted(set(stored.owner)):
        one_hot = Field.constant(size, np.eye(directions)[k])
        combine_factors(zero, left, stored.right, stored.owner, one_hot, out, threads=1)
        rows[k] = out[skip : skip + stop - start]
    return rows
