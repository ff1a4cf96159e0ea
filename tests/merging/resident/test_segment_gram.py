"""Inner products over segments are those of numpy, whatever was asked before."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, Layout, RecipeError
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.lowrank import combine_factors
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.encodings.packing import Packing, StoredColumn, StoredTensor
from mergesearch.merging.resident.segment_gram import (
    CHUNKS,
    LARGEST_CHUNK,
    SegmentGram,
    arena_reader,
    chunk_length,
    expand,
)
from mergesearch.merging.resident.terms import Terms
from mergesearch.merging.tensors.memo import Memo
from tests.merging.arenas import decoded

SIZE = 1000


def arrays(size: int = SIZE, directions: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size, np.float32), rng.standard_normal(
        (directions, size), np.float32
    )


def by_numpy(every: np.ndarray, boundaries: list[int]) -> np.ndarray:
    """The definition; ``every`` is ``(K + 1, size)``."""
    wide = every.astype(np.float64)
    return np.stack([wide[:, a:b] @ wide[:, a:b].T for a, b in pairwise(boundaries)])


def arenas(form: Form = "delta", size_of_last: int = 70) -> Arenas:
    """Tensors kept whole and kept as factors, next to each other and with padding between."""
    shapes = {"a": (9, 7), "b": (70,), "c": (12, 11), "d": (5, 5), "e": (size_of_last,)}
    layout = Layout.build({name: (shape, "float32") for name, shape in shapes.items()})
    ranks = {"a": (1, 2), "c": (0, 3), "d": (0, 0)} if form == "delta" else {}
    whole = StoredTensor("float32", (StoredColumn("float32"),) * 2)
    stored = {
        name: StoredTensor("float32", ranks=ranks[name]) if name in ranks else whole
        for name in shapes
    }
    packing = Packing(layout, 2, "float32", stored)
    rng = np.random.default_rng(1)
    memory = np.zeros(packing.size, np.uint8)  # the padding is zero
    for spec in layout.tensors:
        parts = packing.parts[spec.name]
        for at in (parts.base, *parts.numbers):
            numbers = rng.standard_normal(spec.size, np.float32)
            memory[at : at + 4 * spec.size] = numbers.view(np.uint8)
    for stored in Terms(packing, form, memory).factors:
        for factor in (stored.left, stored.right):
            factor[:] = rng.standard_normal(factor.shape, np.float32)
    return Arenas(layout, form, memory, packing)


def materialised(one: Arenas) -> np.ndarray:
    """Base, and what a coefficient of 1 adds to it, by the kernels of a merge.

    ``(K + 1, size)``.
    """
    base, rows = decoded(one)
    every = np.stack([base, *rows]).astype(np.float64)
    for stored in Terms.of(one).factors:
        at = slice(stored.spec.start, stored.spec.stop)
        for k in range(2):
            field = Field.constant(stored.spec.size, np.eye(2)[k])
            out = np.zeros(stored.spec.size, np.float32)
            combine_factors(out, stored.left, stored.right, stored.owner, field, out)
            every[1 + k, at] = out
    if one.form == "interpolation":
        every[1:] -= every[0]
    return every


class TestAgainstNumpy:
    @given(cuts=st.sets(st.integers(0, SIZE), min_size=2, max_size=40))
    def test_any_boundaries(self, cuts: set[int]) -> None:
        boundaries = sorted(cuts)
        base, rows = arrays()
        result = SegmentGram.of_arrays(base, rows).gram(boundaries)
        assert result.shape == (len(boundaries) - 1, 4, 4)
        np.testing.assert_allclose(
            result, by_numpy(np.vstack([base, rows]), boundaries), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 200_000])
    def test_any_size(self, size: int) -> None:
        base, rows = arrays(size, 1)
        boundaries = sorted({0, size // 3, size // 3 + 1, size // 2, size - 1, size} - {-1})
        result = SegmentGram.of_arrays(base, rows).gram(boundaries)
        np.testing.assert_allclose(
            result, by_numpy(np.vstack([base, rows]), boundaries), rtol=1e-11, atol=1e-9
        )

    def test_memory_maps(self, tmp_path: Path) -> None:
        base, rows = arrays()
        np.vstack([base, rows]).tofile(tmp_path / "arena")
        mapped = np.memmap(tmp_path / "arena", np.float32, "r", shape=(4, SIZE))
        result = SegmentGram.of_arrays(mapped[0], mapped[1:]).gram([3, 500, 900])
        assert np.array_equal(result, SegmentGram.of_arrays(base, rows).gram([3, 500, 900]))

    @pytest.mark.parametrize("form", ["delta", "interpolation"])
    @pytest.mark.parametrize("size_of_last", [70, 64])
    def test_arenas_with_rows_and_factors(self, form: Form, size_of_last: int) -> None:
        one = arenas(form, size_of_last)
        every = materialised(one)
        index = SegmentGram.of(one)
        size = one.layout.size
        for seed in range(20):
            inner = np.random.default_rng(seed).integers(1, size, 9)
            boundaries = sorted({0, size, *inner.tolist()})
            np.testing.assert_allclose(
                index.gram(boundaries), by_numpy(every, boundaries), rtol=1e-10, atol=1e-10
            )

    def test_factors_expand_to_the_bits_of_a_merge(self) -> None:
        one = arenas()
        every = materialised(one)
        for stored in Terms.of(one).factors:
            spec = stored.spec
            for start, stop in (
                (spec.start, spec.stop),
                (spec.start + 3, spec.start + 5),
                (spec.stop - 20, spec.stop),
            ):
                assert np.array_equal(expand(stored, 2, start, stop), every[1:, start:stop])


class TestBits:
    def test_do_not_depend_on_what_was_asked_before_or_on_threads(self) -> None:
        one = arenas()
        size = one.layout.size
        fresh = SegmentGram.of(one)
        used = SegmentGram.of(one)
        threaded = SegmentGram.of(one, threads=2)
        for seed in range(10):
            used.gram(sorted({0, size, *np.random.default_rng(seed).integers(1, size, 6).tolist()}))
        boundaries = [0, 5, 69, 200, 201, size]
        assert fresh.gram(boundaries).tobytes() == used.gram(boundaries).tobytes()
        assert fresh.gram(boundaries).tobytes() == threaded.gram(boundaries).tobytes()

    def test_blocks_of_the_grid_change_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base, rows = arrays(3000)
        one = SegmentGram.of_arrays(base, rows).gram([0, 1000, 3000])
        monkeypatch.setattr("mergesearch.merging.resident.segment_gram._BLOCK", 128)
        assert SegmentGram.of_arrays(base, rows).gram([0, 1000, 3000]).tobytes() == one.tobytes()

    def test_forgetting_pieces_changes_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base, rows = arrays()
        index = SegmentGram.of_arrays(base, rows)
        before = index.gram([0, 7, 70, 71, SIZE])
        monkeypatch.setattr("mergesearch.merging.resident.segment_gram._REMEMBERED", 1)
        assert index.gram([0, 7, 70, 71, SIZE]).tobytes() == before.tobytes()
        assert len(index._pieces) == 1

    def test_a_memo_keeps_the_grid(self, tmp_path: Path) -> None:
        base, rows = arrays()
        every = np.vstack([base, rows]).astype(np.float64)
        reads = []

        def read(start: int, stop: int) -> np.ndarray:
            reads.append((start, stop))
            return every[:, start:stop]

        first = SegmentGram(read, SIZE, 3, memo=Memo(tmp_path), key=["one"]).gram([0, 64, SIZE])
        assert reads
        reads.clear()
        again = SegmentGram(read, SIZE, 3, memo=Memo(tmp_path), key=["one"])
        assert not reads
        assert again.gram([0, 64, SIZE]).tobytes() == first.tobytes()
        SegmentGram(read, SIZE, 3, memo=Memo(tmp_path), key=["other"])
        assert reads


def test_a_small_tensor_behind_a_large_one_keeps_its_digits() -> None:
    """Differences of running sums would leave none: 1e-6 against 1e16."""
    base, rows = arrays(5000, 2)
    rows[:, :4000] *= 1e8
    rows[:, 4500:] *= 1e-3
    rows[1, 4700:] = 0.0
    boundaries = [0, 4000, 4500, 4601, 4700, 5000]
    result = SegmentGram.of_arrays(base, rows).gram(boundaries)
    np.testing.assert_allclose(result, by_numpy(np.vstack([base, rows]), boundaries), rtol=1e-9)
    assert np.all(result[-1, 2] == 0.0)


def test_only_the_chunks_that_are_cut_are_read_again() -> None:
    base, rows = arrays(10_000, 1)
    every = np.vstack([base, rows]).astype(np.float64)
    reads = []

    def read(start: int, stop: int) -> np.ndarray:
        reads.append(stop - start)
        return every[:, start:stop]

    index = SegmentGram(read, 10_000, 1)
    reads.clear()
    index.gram([0, 5003, 10_000])
    assert sum(reads) == index.chunk
    reads.clear()
    index.gram([0, 5003, 7000, 10_000])
    assert sum(reads) == index.chunk


def test_segments_add_up() -> None:
    base, rows = arrays()
    index = SegmentGram.of_arrays(base, rows)
    whole = index.gram([0, SIZE])[0]
    np.testing.assert_allclose(
        index.gram([0, 1, 100, 333, 999, SIZE]).sum(axis=0), whole, rtol=1e-12
    )
    assert np.all(np.linalg.eigvalsh(whole) > 0)


def test_the_grid_stays_small() -> None:
    assert [chunk_length(size) for size in (1, 19_264, CHUNKS * 64, CHUNKS * 64 + 1)] == [
        64,
        64,
        64,
        128,
    ]
    assert chunk_length(7_000_000_000) == LARGEST_CHUNK


@pytest.mark.parametrize("boundaries", [[0], [0, 0, 5], [5, 3], [-1, 4], [0, SIZE + 1], [[0, 1]]])
def test_refuses_what_are_no_boundaries(boundaries: list) -> None:
    with pytest.raises(RecipeError, match="expected increasing boundaries within 0"):
        SegmentGram.of_arrays(*arrays()).gram(boundaries)


def test_padding_adds_nothing() -> None:
    one = arenas()
    read = arena_reader(one)
    for spec, after in zip(one.layout.tensors, [*one.layout.tensors[1:], None], strict=True):
        stop = one.layout.size if after is None else after.start
        assert not read(spec.stop, stop).any()
