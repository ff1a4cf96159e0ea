"""Cases for Triton's interpreter: the bits of the CPU, and the bytes that kernels load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, InputError
from mergesearch.merging.kernels.forms import ELECTIONS
from mergesearch.merging.kernels.spans import Column, ColumnDtype, Span
from tests.merging.kernels import span_reference as reference
from tests.merging.kernels.span_reference import Row, Stretch, same_bits

DTYPES = ("float32", "bfloat16", "float16")

#: Rows of every kind: what each dtype is like, with and without base, scale and mask.
_ROWS: tuple[tuple[Row, ...], ...] = (
    (Row("bfloat16", True), Row("bfloat16", True), Row("bfloat16", True)),
    (Row("float32"), Row("float16", True, 0.3), Row("int8", scale=1.7)),
    (Row("bfloat16", True, 1.5, True), Row("int8", masked=True), Row("float32", masked=True)),
    (
        Row("bfloat16", True, masked=True, packed=True),
        Row("float16", True, 0.3, masked=True, packed=True),
        Row("float32", masked=True, packed=True),
    ),
)


def mixed_arena(alignment: int = 64) -> tuple[reference.Bytes, tuple[Span, ...]]:
    """Four spans of three rows: whole blocks and parts of them, shared and not."""
    stretches = [
        Stretch(4500, "bfloat16", _ROWS[0]),
        Stretch(301, "float32", _ROWS[1]),
        Stretch(2500, "float16", _ROWS[2], shared=True),
        Stretch(2713, "bfloat16", _ROWS[3], shared=True),
    ]
    return reference.random_arena(np.random.default_rng(7), stretches, alignment)


def segments_of(spans: Sequence[Span], *edges: int) -> np.ndarray:
    return np.array([0, *edges, spans[-1].stop], np.int64)


def merged(
    memory: reference.Bytes,
    spans: Sequence[Span],
    weights: np.ndarray,
    boundaries: np.ndarray,
    dtype: str = "float32",
    election: str = "",
    **options: Any,
) -> np.ndarray:
    """What the kernel writes, bf16 as its bits; positions that it leaves are 0."""
    import torch

    from mergesearch.merging.kernels.triton_combine import combine

    out = torch.zeros(int(boundaries[-1]), dtype=getattr(torch, dtype))
    combine(torch.from_numpy(memory), spans, weights, boundaries, out, election, **options)
    return out.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else out.numpy()


def by_numba(
    memory: reference.Bytes,
    spans: Sequence[Span],
    weights: np.ndarray,
    boundaries: np.ndarray,
    dtype: str,
    election: str,
) -> np.ndarray:
    """What the kernel of the CPU writes."""
    import torch

    from mergesearch.merging.kernels import spans_numba

    out = torch.zeros(int(boundaries[-1]), dtype=getattr(torch, dtype))
    spans_numba.combine(memory, spans, weights, boundaries, out, 1, election)
    return out.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else out.numpy()


def check_bits(
    memory: reference.Bytes,
    spans: Sequence[Span],
    weights: np.ndarray,
    boundaries: np.ndarray,
    dtype: str = "float32",
    election: str = "",
) -> None:
    """The kernel, numba and the reference agree to the bit."""
    problem = (memory, spans, weights, boundaries, dtype, election)
    result = merged(*problem)
    assert same_bits(result, reference.combine(*problem))
    assert same_bits(result, by_numba(*problem))


def random_weights(terms: int, segments: int, seed: int = 0) -> np.ndarray:
    """Weights of which one in five is 0; that of the base is 1, as for differences."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((terms, segments)).astype(np.float32)
    weights[generator.random(weights.shape) < 0.2] = 0
    weights[0] = 1
    return weights


def _sum(dtype: str) -> None:
    memory, spans = mixed_arena()
    weights = random_weights(4, 4)
    weights[2, 3] = 0  # a row that shares positions counts where it is not used
    check_bits(memory, spans, weights, segments_of(spans, 100, 4096, 4700), dtype)


def _election(election: str) -> None:
    memory, spans = mixed_arena()
    boundaries = segments_of(spans, 2048, 4700)
    check_bits(memory, spans, random_weights(4, 3), boundaries, "bfloat16", election)


def _many_rows(election: str) -> None:
    """More rows than the CPU elects from in one pass, and than a program takes eight numbers of."""
    generator = np.random.default_rng(3)
    for count in (6, 17):
        rows = tuple(Row("float32") for _ in range(count))
        memory, spans = reference.random_arena(generator, [Stretch(203, "float32", rows)])
        weights = random_weights(count + 1, 1)
        check_bits(memory, spans, weights, segments_of(spans), "float32", election)


def _weights_at_the_ends() -> None:
    """0 gives the base, one-hot the row, all 0 zeros; NaN and infinity stay in their segments."""
    memory, spans = mixed_arena()
    boundaries = segments_of(spans, 64, 128, 192, 256, 320)
    weights = np.zeros((4, 6), np.float32)
    weights[:, 0] = [1, 0, 0, 0]
    weights[:, 1] = [0, 0, 1, 0]
    weights[:, 3] = [1, np.nan, 0, 0]
    weights[:, 4] = [1, np.inf, 0, -np.inf]
    weights[:, 5] = [0.5, 0, 0, -1]
    result = merged(memory, spans, weights, boundaries)
    assert same_bits(result, reference.combine(memory, spans, weights, boundaries, "float32"))
    assert same_bits(result[:64], reference.decode(memory, spans[0], 0)[:64])
    assert same_bits(result[64:128], reference.decode(memory, spans[0], 2)[64:128])
    assert result[128:192].tobytes() == bytes(256)
    assert np.isnan(result[192:256]).all()
    assert np.isfinite(result[320:]).all()
    part = spans[1:2]
    weights = np.array([[1], [2], [np.inf], [-np.inf]], np.float32)
    for election in ELECTIONS:
        check_bits(memory, part, weights, segments_of(part), "float32", election)


def _rounding() -> None:
    """Every upper half of fp32, ties and neighbours, as stored: infinities and NaN among them."""
    upper = np.arange(0, 1 << 16, 37, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0xF000], np.uint32)
    numbers = (upper[:, None] | lower[None, :]).reshape(-1)[:4096].view(np.float32)
    memory = np.frombuffer(numbers.tobytes(), np.uint8).copy()
    spans = (Span(0, numbers.size, Column("float32", 0), ()),)
    weights = np.ones((1, 1), np.float32)
    for dtype in ("bfloat16", "float16"):
        result = merged(memory, spans, weights, segments_of(spans), dtype)
        assert same_bits(result, reference.narrow(numbers, dtype))


def _unaligned() -> None:
    """Parts of an arena that start at multiples of four bytes only."""
    memory, spans = mixed_arena(alignment=4)
    assert any(row.offset % 16 for span in spans for row in span.rows)
    check_bits(memory, spans, random_weights(4, 2), segments_of(spans, 3000))


def _short_segments() -> None:
    """Segments that begin and end anywhere, with positions between spans that stay as they are."""
    memory, spans = mixed_arena()
    edges = np.unique(np.random.default_rng(5).integers(1, spans[-1].stop, 12)).tolist()
    check_bits(memory, spans, random_weights(4, len(edges) + 1), segments_of(spans, *edges))
    gap = slice(spans[1].stop, spans[2].start)
    assert gap.start < gap.stop
    boundaries = segments_of(spans)
    assert not merged(memory, spans, random_weights(4, 1), boundaries)[gap].any()


def _many_signatures() -> None:
    """Spans stored in thirteen ways: nine kernels, and one for what is left."""
    from mergesearch.merging.kernels.triton_blocks import launches
    from mergesearch.merging.kernels.triton_combine import traffic

    kinds: Sequence[ColumnDtype] = ("float32", "bfloat16", "float16", "int8")
    stretches = [
        Stretch(70 + 3 * n, base, (Row(kind, masked=n % 2 > 0), Row("bfloat16", True)), n > 5)
        for n, (base, kind) in enumerate((base, kind) for base in kinds[:3] for kind in kinds)
    ]
    packed = Row("bfloat16", True, masked=True, packed=True)
    stretches.append(Stretch(65, "bfloat16", (packed, Row("bfloat16", True)), True))
    memory, spans = reference.random_arena(np.random.default_rng(2), stretches)
    boundaries = segments_of(spans)
    planned = launches(spans, boundaries, 2048)
    assert [bool(launch.signature.codes) for launch in planned] == [True] * 9 + [False]
    assert sum(len(launch.columns) for launch in planned) == 13
    weights = random_weights(3, 1)
    assert traffic(spans, weights, boundaries, "float32").launches == 10
    check_bits(memory, spans, weights, boundaries)
    check_bits(memory, spans, weights, boundaries, "float16", "elect_mean")


@contextmanager
def counted_loads() -> Iterator[list[int]]:
    """Bytes that the interpreter loads, and stores, each address once a load."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = [0, 0]
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def moved(pointers: Any, mask: Any) -> int:
        item = pointers.get_element_ty().primitive_bitwidth // 8
        where = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        return item * len(np.unique(pointers.data[where]))

    def counted_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        counts[0] += moved(pointers, mask)
        return load(self, pointers, mask, *more)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        counts[1] += moved(pointers, mask)
        return store(self, pointers, value, mask, *more)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def _traffic_is_what_is_loaded() -> None:
    from mergesearch.merging.kernels.triton_combine import traffic

    memory, spans = mixed_arena()
    boundaries = segments_of(spans, 100, 4096, 4700)
    weights = random_weights(4, 4, seed=1)
    weights[0, 2] = 0
    assert (weights[1:] == 0).any()
    for election in ("", "elect_max"):
        with counted_loads() as counts:
            merged(memory, spans, weights, boundaries, "bfloat16", election)
        expected = traffic(spans, weights, boundaries, "bfloat16", election)
        assert [expected.read, expected.written] == counts
        assert expected.launches == 4


def _large_models_are_moved_once() -> None:
    """The layout of an 8B model, four experts in bf16, a coefficient for every tensor."""
    from mergesearch.merging.kernels.triton_combine import traffic

    layer = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, *[14336 * 4096] * 3, 4096, 4096]
    sizes = [128256 * 4096, *layer * 32, 4096, 128256 * 4096]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for rows in (
        [Row("bfloat16", True)] * 4,
        [Row("bfloat16", True, 1.0, True)] * 4,
        [Row("bfloat16", True, 1.0, True, True)] * 4,
        [Row("int8")] * 8,
        [Row("float32")],
    ):
        spans = []
        at = 0
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            columns = []
            for row in (Row("bfloat16"), *rows):
                column = Column(row.dtype, at, row.minus_base)
                column = replace(column, scales=at if row.dtype == "int8" else None)
                column = replace(column, mask=at if row.masked else None)
                count = (stop - start) // 5
                column = replace(column, starts=at, count=count) if row.packed else column
                columns.append(column)
                at += 4 * (stop - start)
            base, *kept = columns
            spans.append(Span(start, stop, base, tuple(kept)))
        weights = np.ones((len(rows) + 1, len(sizes)), np.float32)
        for boundaries in (starts, starts[[0, -1]]):
            moved = traffic(spans, weights[:, : len(boundaries) - 1], boundaries, "bfloat16")
            assert moved.launches <= 10
            assert moved.read + moved.written <= 1.05 * moved.ideal


def _tables_are_kept() -> None:
    import torch

    from mergesearch.merging.kernels.triton_blocks import KEPT_TABLES, Tables, span_tables

    memory, spans = mixed_arena()
    boundaries = segments_of(spans, 3000)
    tables = Tables()
    device = torch.device("cpu")
    first = span_tables(tables, spans, boundaries, 2048, device)
    assert span_tables(tables, spans, boundaries.copy(), 2048, device) is first
    assert span_tables(tables, spans, segments_of(spans, 3001), 2048, device) is not first
    for edge in range(1, 3 * KEPT_TABLES):
        span_tables(tables, spans, segments_of(spans, edge), 2048, device)
    assert len(tables._kept) == KEPT_TABLES
    weights = random_weights(4, 2)
    once = merged(memory, spans, weights, boundaries, tables=tables)
    weights[1:] *= 2
    again = merged(memory, spans, weights, boundaries, tables=tables)
    assert not same_bits(once, again)
    assert same_bits(again, reference.combine(memory, spans, weights, boundaries, "float32"))


def _refusals() -> None:
    import torch

    from mergesearch.merging.kernels.triton_blocks import usable

    assert usable(torch.device("cpu"))  # the interpreter is on
    memory, spans = mixed_arena()
    boundaries = segments_of(spans)
    weights = random_weights(4, 1)
    rows = spans[0].rows
    wide = Span(0, 64, Column("float64", 0), rows)
    odd = Span(0, 64, Column("float32", 2), rows)
    packed = Span(0, 64, rows[0], (Column("float32", 0, mask=2, starts=8), *rows[1:]))
    for wrong, words in (
        ([wide], "received float64; use kernel='torch'"),
        ([odd], "received offsets 2"),
        ([packed], "received offsets 2 and 8"),
        ([Span(32, 64, spans[0].base, rows)], "multiples of 64"),
        ([spans[0], Span(4544, 4600, spans[0].base, rows[:1])], "of 1 rows"),
    ):
        assert words in refusal(lambda w=wrong: merged(memory, w, weights, boundaries))
    assert "expected fp32 weights" in refusal(
        lambda: merged(memory, spans, weights[1:], boundaries)
    )
    assert "received torch.float64" in refusal(
        lambda: merged(memory, spans, weights, boundaries, "float64")
    )


def refusal(act: Callable[[], object]) -> str:
    """What an ``InputError`` says."""
    with pytest.raises(InputError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def _factors(dtype: str) -> None:
    """Matrices of any size in one merge, against the kernel of the CPU."""
    import torch

    from mergesearch.merging.kernels.lowrank import combine_factors
    from mergesearch.merging.kernels.triton_factors import Matrix, combine

    generator = np.random.default_rng(4)
    parts: list[bytes] = []
    matrices = []
    arrays = []

    def put(numbers: np.ndarray) -> int:
        held = numbers.tobytes()
        parts.append(held + bytes(-len(held) % 128))
        return sum(map(len, parts)) - len(parts[-1])

    start = 0
    for m, n, rank, stored in ((70, 136, 5, "bfloat16"), (33, 17, 3, "float32"), (1, 40, 0, dtype)):
        numbers = generator.standard_normal(m * n, dtype=np.float32)
        numbers[::7] = -0.0  # a term of weight 0 would make it 0
        base = reference.narrow(numbers, stored)
        left = generator.standard_normal((m, rank), dtype=np.float32)
        right = generator.standard_normal((rank, n), dtype=np.float32)
        owner = tuple(sorted(generator.integers(0, 3, rank).tolist()))
        column = Column(stored, put(base))  # type: ignore[arg-type]
        matrices.append(Matrix(start, m, n, column, put(left), put(right), owner))
        arrays.append((widened(base), left, right, owner))
        start += -(-m * n // 64) * 64
    values = generator.standard_normal((3, 5)).astype(np.float32).astype(np.float64)
    values[:, 0] = 0
    values[1, 2] = 0
    values[2, 3] = np.inf
    field = Field(np.array([0, 300, 9000, 9650, 9700, start]), values)
    out = torch.zeros(start, dtype=getattr(torch, dtype))
    memory = torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).copy())
    combine(memory, matrices, values.astype(np.float32), field.boundaries, out)
    result = out.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else out.numpy()
    for matrix, (base, left, right, owner) in zip(matrices, arrays, strict=True):
        place = slice(matrix.start, matrix.start + base.size)
        cuts = np.unique(np.clip(field.boundaries, place.start, place.stop))
        part = Field(cuts - place.start, field.at(cuts[:-1]))
        expected = np.empty(base.size, np.float32)
        combine_factors(base, left, right, owner, part, expected, kernel="numba", threads=1)
        assert same_bits(result[place], reference.narrow(expected, dtype))
    assert np.isnan(widened(result)[9650:9690]).all()


def widened(numbers: np.ndarray) -> np.ndarray:
    """In fp32; bf16 is given as its bits."""
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)


def _products() -> None:
    """Against sums in fp64, within a share of the sum of magnitudes; twice, the same bits."""
    import torch

    from mergesearch.merging.kernels.products import products as on_cpu
    from mergesearch.merging.kernels.triton_products import products

    stretches = [Stretch(9000, "bfloat16", _ROWS[0]), Stretch(301, "float16", _ROWS[2], True)]
    stretches.append(Stretch(450, "bfloat16", _ROWS[3], True))
    memory, spans = reference.random_arena(np.random.default_rng(8), stretches)
    boundaries = segments_of(spans, 77, 8200, 9100)
    size = spans[-1].stop
    rows = np.zeros((4, size), np.float32)
    for span in spans:
        for term in range(4):
            rows[term, span.start : span.stop] = reference.decode(memory, span, term)
    arena = torch.from_numpy(memory)
    numbers = np.random.default_rng(9).standard_normal(size, dtype=np.float32)
    for dtype, base, from_base in (
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.bfloat16, True, False),
    ):
        vector = torch.from_numpy(numbers).to(dtype)
        wide = vector.float().numpy()
        found = products(arena, spans, vector, boundaries, base=base, from_base=from_base)
        origin = rows[0] if base or from_base else None
        expected = on_cpu(wide, rows[1:], boundaries, base=origin, from_base=from_base)
        magnitude = on_cpu(np.abs(wide), np.abs(rows[1:]), boundaries, base=np.abs(rows[0]))
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= 1e-6 * magnitude.max(axis=0)).all()
    again = products(arena, spans, vector, boundaries, base=True)
    assert found.tobytes() == again.tobytes()


CASES: dict[str, Callable[[], None]] = {
    **{f"sum in {dtype}": lambda d=dtype: _sum(d) for dtype in DTYPES},  # type: ignore[misc]
    **{rule: lambda r=rule: _election(r) for rule in ELECTIONS},  # type: ignore[misc]
    "sum of many rows": lambda: _many_rows(""),
    "election of many rows": lambda: _many_rows("elect_weighted"),
    "weights at the ends": _weights_at_the_ends,
    "rounding": _rounding,
    "unaligned": _unaligned,
    "short segments": _short_segments,
    "many signatures": _many_signatures,
    "traffic is what is loaded": _traffic_is_what_is_loaded,
    "large models are moved once": _large_models_are_moved_once,
    "tables are kept": _tables_are_kept,
    "refusals": _refusals,
    "factors in float32": lambda: _factors("float32"),
    "factors in bfloat16": lambda: _factors("bfloat16"),
    "products": _products,
}
