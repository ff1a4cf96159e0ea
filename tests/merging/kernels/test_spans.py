"""Spans: the reference's bits from numba and torch, whatever the rows are stored as."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import config

from mergesearch.merging import Field, InputError, RecipeError
from mergesearch.merging.kernels import numba_kernel, spans_numba, spans_torch
from mergesearch.merging.kernels.chunks import ranges, spread, stamp, whole
from mergesearch.merging.kernels.dispatch import combine, term_weights
from mergesearch.merging.kernels.forms import ELECTIONS, Form
from mergesearch.merging.kernels.span_dispatch import SpanKernel, combine_spans
from mergesearch.merging.kernels.spans import Column, Span
from mergesearch.merging.kernels.spans_decode import read
from tests.merging.kernels import span_reference as reference
from tests.merging.kernels.span_reference import Row, Stretch

KERNELS: tuple[SpanKernel, ...] = ("numba", "torch")
DTYPES = ("float32", "bfloat16", "float16")
STORED = (*DTYPES, "int8")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def arena_of(seed: int) -> tuple[Bytes, tuple[Span, ...], np.ndarray, np.ndarray]:
    """A random arena of a few spans, segments that end anywhere, and weights with some zeros."""
    generator = np.random.default_rng(seed)
    directions = int(generator.integers(1, 8))

    def row() -> Row:
        dtype = str(generator.choice(STORED))
        kept = generator.integers(3)
        return Row(
            dtype,  # type: ignore[arg-type]
            minus_base=bool(generator.integers(2)),
            scale=float(generator.choice([1, 1.5, -0.3])),
            masked=kept > 0,
            packed=kept > 1 and dtype != "int8",
        )

    stretches = []
    for _ in range(generator.integers(1, 4)):
        alike = row()
        rows = tuple(alike if generator.random() < 0.4 else row() for _ in range(directions))
        base = str(generator.choice(DTYPES))
        size = int(generator.integers(1, 1500))
        stretches.append(
            Stretch(size, base, rows, bool(generator.integers(2)))  # type: ignore[arg-type]
        )
    # Parts of an arena may start at any byte.
    memory, spans = reference.random_arena(generator, stretches, int(generator.choice([1, 2, 64])))
    size = spans[-1].stop
    edges = generator.integers(0, size, generator.integers(0, 5))
    boundaries = np.unique([0, size, *edges]).astype(np.int64)
    weights = generator.standard_normal((directions + 1, len(boundaries) - 1)).astype(np.float32)
    weights[generator.random(weights.shape) < 0.2] = 0
    return memory, spans, boundaries, weights


def merged(
    kernel: SpanKernel,
    memory: Bytes,
    spans: Any,
    weights: np.ndarray,
    boundaries: np.ndarray,
    dtype: str,
    election: str = "",
    threads: int = 1,
) -> np.ndarray:
    """The result, bf16 as its bits; 0 between the spans."""
    out = torch.zeros(int(boundaries[-1]), dtype=getattr(torch, dtype))
    if kernel == "numba":
        spans_numba.combine(memory, spans, weights, boundaries, out, threads, election)
    else:
        arena = torch.from_numpy(memory)
        spans_torch.combine(arena, spans, weights, boundaries, out, threads, election)
    return bits(out)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def canonical(result: np.ndarray) -> np.ndarray:
    """Torch's rounding has other NaNs on some machines."""
    if result.dtype == np.uint16:
        return np.where(result & 0x7FFF > 0x7F80, np.uint16(0x7FC0), result)
    return result


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(12))
def test_sums_and_elections_have_the_bits_of_the_reference(kernel: SpanKernel, seed: int) -> None:
    memory, spans, boundaries, weights = arena_of(seed)
    for rule in ("", *ELECTIONS):
        if rule:
            weights[0] = 1
        dtypes = DTYPES if kernel == "numba" or not rule else ("float32",)
        for dtype in dtypes:
            expected = reference.combine(memory, spans, weights, boundaries, dtype, rule)
            result = merged(kernel, memory, spans, weights, boundaries, dtype, rule)
            assert reference.same_bits(canonical(result), expected), (rule, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["", *ELECTIONS])
def test_the_bits_are_those_of_fp32_rows_rounded_once(dtype: str, rule: str) -> None:
    rows = (
        Row("bfloat16", minus_base=True),
        Row("bfloat16", minus_base=True, masked=True),
        Row("float16"),
        Row("int8"),
        Row("float32", minus_base=True, scale=0.5),
        Row("bfloat16", minus_base=True, masked=True, packed=True),
    )
    generator = np.random.default_rng(7)
    memory, spans = reference.random_arena(generator, [Stretch(3001, "bfloat16", rows)])
    terms = [reference.decode(memory, spans[0], term) for term in range(len(rows) + 1)]
    field = Field(np.array([0, 1000, 3001]), generator.uniform(-1, 1, (len(rows), 2)))
    weights = term_weights(field, "delta")
    wide = np.empty(3001, np.float32)
    numba_kernel.combine(terms, weights, field.boundaries, wide, 1, rule)
    expected = torch.from_numpy(wide).to(getattr(torch, dtype))
    result = merged("numba", memory, spans, weights, field.boundaries, dtype, rule)
    assert reference.same_bits(result, bits(expected))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("base", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [whole.MANY - 1, whole.MANY, 2 * whole.GROUP + 1])
def test_sums_in_parts_have_the_bits_of_the_reference(count: int, base: Any, shared: bool) -> None:
    kinds = (
        Row("bfloat16", minus_base=True),
        Row("bfloat16", minus_base=True, masked=True),
        Row("float32"),
        Row("int8", scale=1.5),
        Row("bfloat16", minus_base=True, masked=True, packed=True),
    )
    rows = tuple(kinds[t % len(kinds)] for t in range(count))
    size = 2 * whole.PIECE * 64 + 100  # three pieces and the end of a chunk
    generator = np.random.default_rng(count)
    memory, spans = reference.random_arena(generator, [Stretch(size, base, rows, shared)])
    boundaries = np.array([0, 999, size])
    weights = generator.standard_normal((count + 1, 2)).astype(np.float32)
    weights[0] = 0, 1  # without the base, and with it
    weights[3, 1] = 0
    for dtype in ("bfloat16", "float32"):
        expected = reference.combine(memory, spans, weights, boundaries, dtype, "")
        result = merged("numba", memory, spans, weights, boundaries, dtype)
        assert reference.same_bits(canonical(result), expected)


@pytest.mark.parametrize("rule", ["", "elect_mean"])
def test_threads_change_no_bit(rule: str) -> None:
    size = 3 * numba_kernel.SHORTEST_TASK + 100
    rows = (Row("bfloat16", minus_base=True), Row("int8", masked=True))
    generator = np.random.default_rng(0)
    memory, spans = reference.random_arena(generator, [Stretch(size, "bfloat16", rows)])
    boundaries = np.array([0, 999, size // 2, size])
    weights = np.ones((3, 3), np.float32)
    weights[1:] = generator.standard_normal((2, 3))
    one, two = (
        merged("numba", memory, spans, weights, boundaries, "bfloat16", rule, threads)
        for threads in (1, 2)
    )
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_16_bit_number_is_widened_and_comes_back(kernel: SpanKernel, dtype: str) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16)
    tensor = torch.from_numpy(numbers.copy()).view(getattr(torch, dtype))
    span = Span(0, numbers.size, Column(dtype, 0), ())  # type: ignore[arg-type]
    memory = numbers.view(np.uint8)
    arena = memory if kernel == "numba" else torch.from_numpy(memory)
    base, rows = read(arena, [span], 0, numbers.size)
    assert reference.same_bits(np.asarray(base), tensor.float().numpy())
    assert rows.shape == (0, numbers.size)
    one = np.ones((1, 1), np.float32)
    back = merged(kernel, memory, [span], one, np.array([0, numbers.size]), dtype)
    number = ~np.isnan(tensor.float().numpy())
    assert (back[number].view(np.uint16) == numbers[number]).all()
    assert np.isnan(torch.from_numpy(back).view(tensor.dtype).float().numpy()[~number]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_to_nearest_with_ties_to_even(dtype: str) -> None:
    generator = np.random.default_rng(1)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    # Around every tie of both dtypes, and anywhere: fp16 drops 13 bits, more where it is subnormal.
    lower = [0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0xFFFF]
    ends = [upper | np.uint32(low) for low in lower]
    anywhere = generator.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    numbers = np.concatenate([*ends, anywhere]).view(np.float32)
    span = Span(0, numbers.size, Column("float32", 0), ())
    one = np.ones((1, 1), np.float32)
    boundaries = np.array([0, numbers.size])
    result = merged("numba", numbers.view(np.uint8), [span], one, boundaries, dtype)
    expected = reference.narrow(numbers, dtype)
    assert reference.same_bits(result, expected)
    number = ~np.isnan(numbers)
    by_torch = bits(torch.from_numpy(numbers).to(getattr(torch, dtype)))
    assert result[number].tobytes() == by_torch[number].tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_special_numbers_pass_through(kernel: SpanKernel) -> None:
    special = np.array([1, -0.0, 0.0, 1e-45, -3e38, np.inf, -np.inf, np.nan] * 9, np.float32)
    generator = np.random.default_rng(2)
    rows = [generator.permutation(special) for _ in range(5)]
    memory = np.concatenate([special, *rows]).view(np.uint8)
    n = special.size
    columns = tuple(Column("float32", 4 * n * k, minus_base=k % 2 == 1) for k in range(1, 6))
    spans = (Span(0, n, Column("float32", 0), columns),)
    boundaries = np.array([0, 13, n])
    weights = generator.standard_normal((6, 2)).astype(np.float32)
    for rule in ("", *ELECTIONS):
        weights[0] = 1 if rule else weights[0]
        expected = reference.combine(memory, spans, weights, boundaries, "float32", rule)
        result = merged(kernel, memory, spans, weights, boundaries, "float32", rule)
        assert reference.same_bits(result, expected), rule


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ["delta", "interpolation", "elect_mean"])
def test_terms_of_weight_0_are_left_out(kernel: SpanKernel, form: Form) -> None:
    base = np.array([1.0, -0.0, 0.0, 1e-45, -3e38, np.inf], np.float32)
    memory = np.concatenate([base, np.full(6, np.nan, np.float32)]).view(np.uint8)
    spans = [Span(0, 6, Column("float32", 0), (Column("float32", 24),))]
    out = np.full(6, np.nan, np.float32)
    combine_spans(memory, spans, Field.constant(6, [0]), form, out, kernel=kernel)
    assert out.tobytes() == base.tobytes()
    if form == "interpolation":
        memory = memory.view(np.float32)[::-1].copy().view(np.uint8)  # now the base would show
        combine_spans(memory, spans, Field.constant(6, [1]), form, out, kernel=kernel)
        assert out.tobytes() == base[::-1].tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_positions_between_spans_are_left(kernel: SpanKernel) -> None:
    memory = np.zeros(64, np.uint8)
    spans = [Span(64, 70, Column("float32", 0), ()), Span(128, 131, Column("bfloat16", 1), ())]
    out = np.full(200, 7, np.float32)
    combine_spans(memory, spans, Field.constant(200, []), "delta", out, kernel=kernel)
    assert (np.flatnonzero(out == 0) == [*range(64, 70), *range(128, 131)]).all()
    assert (out[out != 0] == 7).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_range_is_read_as_decoded(kernel: SpanKernel, seed: int) -> None:
    memory, spans, _, _ = arena_of(100 + seed)
    arena = memory if kernel == "numba" else torch.from_numpy(memory)
    size = spans[-1].stop
    whole = np.zeros((len(spans[0].rows) + 1, size), np.float32)
    for span in spans:
        for term in range(len(whole)):
            whole[term, span.start : span.stop] = reference.decode(memory, span, term)
    ranges = np.sort(np.random.default_rng(seed).integers(0, size + 1, (6, 2)), axis=1)
    for start, stop in [(0, size), *ranges.tolist()]:
        base, rows = (np.asarray(part) for part in read(arena, spans, start, stop))
        assert reference.same_bits(base, whole[0, start:stop])
        assert reference.same_bits(rows, whole[1:, start:stop])
        nothing, rows = read(arena, spans, start, stop, base=False)
        assert nothing is None
        assert reference.same_bits(np.asarray(rows), whole[1:, start:stop])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ["delta", "interpolation", "slerp"])
def test_combine_spans_is_combine(kernel: SpanKernel, form: Form, tmp_path: Path) -> None:
    base, *rows = np.random.default_rng(3).standard_normal((3, 500), dtype=np.float32)
    rows = rows[:1] if form == "slerp" else rows
    np.concatenate([base, *rows]).tofile(tmp_path / "arena")
    memory = np.memmap(tmp_path / "arena", dtype=np.uint8, mode="r")
    columns = tuple(Column("float32", 2000 * (k + 1)) for k in range(len(rows)))
    spans = [Span(0, 500, Column("float32", 0), columns)]
    field = Field(np.array([0, 77, 500]), np.array([[0.3, 0.7], [0.1, 0.0]][: len(rows)]))
    angles = Field(np.array([0, 300, 500]), np.array([[1.1, 0.0]])) if form == "slerp" else None
    out, expected = np.empty((2, 500), np.float32)
    combine_spans(memory, spans, field, form, out, angles=angles, kernel=kernel)
    combine(base, rows, field, form, expected, angles=angles)
    assert out.tobytes() == expected.tobytes()


def test_fp64_columns_are_summed_in_fp64() -> None:
    base, *rows = np.random.default_rng(4).standard_normal((3, 100))
    memory = np.concatenate([base, *rows]).view(np.uint8)
    columns = (Column("float64", 800), Column("float64", 1600))
    spans = [Span(0, 100, Column("float64", 0), columns)]
    out, expected = np.empty((2, 100))
    field = Field.constant(100, [0.1, 0.2])
    combine_spans(memory, spans, field, "interpolation", out)
    combine(base, rows, field, "interpolation", expected)
    assert out.tobytes() == expected.tobytes()
    first, others = read(memory, spans, 10, 20)
    assert first.tobytes() == base[10:20].tobytes()
    assert others.tobytes() == np.array(rows)[:, 10:20].tobytes()


def test_refuses_what_does_not_fit() -> None:
    memory = np.zeros(64, np.uint8)
    spans = [Span(0, 4, Column("float32", 0), (Column("float32", 16),))]
    out = np.zeros(4, np.float32)
    with pytest.raises(RecipeError, match="expected a field of 1 directions, received 2"):
        combine_spans(memory, spans, Field.constant(4, [0, 0]), "delta", out)
    with pytest.raises(InputError, match=r"expected a contiguous out of shape \(5,\)"):
        combine_spans(memory, spans, Field.constant(5, [0]), "delta", out)
    with pytest.raises(InputError, match="expected an arena of bytes"):
        combine_spans(out, spans, Field.constant(4, [0]), "delta", out)
    with pytest.raises(InputError, match="expected spans in order within 3 positions"):
        combine_spans(memory, spans, Field.constant(3, [0]), "delta", out[:3])
    with pytest.raises(InputError, match="kernel 'triton' cannot merge into float32 on cpu"):
        combine_spans(memory, spans, Field.constant(4, [0]), "delta", out, kernel="triton")
    with pytest.raises(InputError, match="kernel 'numba' cannot merge into float64 on cpu"):
        combine_spans(memory, spans, Field.constant(4, [0]), "delta", np.zeros(4), kernel="numba")
    with pytest.raises(RecipeError, match="expected one row and its angles"):
        combine_spans(memory, spans, Field.constant(4, [0]), "slerp", out)


def test_compiled_code_is_renewed_when_the_code_that_it_emits_changes() -> None:
    for function in (ranges.sum_chunks, ranges.decode, ranges.combine_pieces):
        held = [cell.cell_contents for cell in function.py_func.__closure__]
        assert held == [stamp.sources_digest()]  # numba's cache looks at what a closure holds
    assert {path.name for path in stamp.SOURCES} >= {"loops.py", "columns.py", "narrow.py"}


def test_numbers_are_expanded_by_processors_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, expected in (("+avx2,+avx512vbmi2", True), ("-avx512vbmi2", False), ("", False)):
        spread.expands.cache_clear()
        monkeypatch.setattr(config, "CPU_FEATURES", features)
        assert spread.expands() == expected
    spread.expands.cache_clear()


@pytest.mark.slow
def test_any_processor_has_the_bits_of_the_reference(tmp_path: Path) -> None:
    """One without instructions of its own, so that numbers are spread one by one."""
    test = test_sums_and_elections_have_the_bits_of_the_reference.__name__
    plain = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", f"{__file__}::{test}", "-k", "numba"],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
