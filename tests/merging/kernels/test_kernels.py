"""combine: a reference in float64, the same bits from every kernel, and linearity."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import Field, InputError, RecipeError
from mergesearch.merging.kernels import numba_kernel, torch_kernel
from mergesearch.merging.kernels.dispatch import combine, default_threads, term_weights
from mergesearch.merging.kernels.forms import ELECTIONS, Form, Kernel

FORMS: tuple[Form, ...] = ("delta", "interpolation")
KERNELS: tuple[Kernel, ...] = ("numba", "torch")

#: Coefficients that a search produces, with the exact zeros and ones that take other paths.
_COEFFICIENT = st.one_of(st.just(0.0), st.just(1.0), st.floats(-2, 2, width=64))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Field]:
    """Base ``(n,)``, basis ``(K, n)`` and a field of a few segments.

    There are negative zeros among the numbers.
    """
    size = draw(st.integers(1, 3000))
    directions = draw(st.integers(1, 11))
    inner = draw(st.lists(st.integers(1, max(size - 1, 1)), max_size=5))
    edges = sorted({0, size, *(edge for edge in inner if edge < size)})
    values = draw(
        st.lists(
            _COEFFICIENT,
            min_size=directions * (len(edges) - 1),
            max_size=directions * (len(edges) - 1),
        )
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = generator.standard_normal((directions + 1, size), dtype=np.float32)
    arrays[generator.random(arrays.shape) < 0.05] = -0.0
    return arrays[0], arrays[1:], Field(np.array(edges), np.array(values).reshape(directions, -1))


def merged(base: Any, basis: Any, field: Field, form: Form = "delta", **options: Any) -> np.ndarray:
    out = np.full(len(base), np.nan, np.float32)
    combine(base, basis, field, form, out, **options)
    return out


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


def reference(base: np.ndarray, basis: np.ndarray, field: Field, form: Form) -> np.ndarray:
    """The definition, in float64 throughout."""
    coefficients = field.at(np.arange(field.size))
    first = np.ones(field.size) if form == "delta" else 1 - coefficients.sum(axis=0)
    return first * base.astype(np.float64) + (coefficients * basis.astype(np.float64)).sum(axis=0)


@pytest.mark.parametrize("form", FORMS)
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_numba_and_torch_agree_with_the_reference_and_to_the_bit(form: Form, problem: Any) -> None:
    base, basis, field = problem
    by_numba, by_torch = (merged(base, basis, field, form, kernel=kernel) for kernel in KERNELS)
    assert same_bits(by_numba, by_torch)
    scale = 1 + np.abs(field.values).sum(axis=0).max()
    np.testing.assert_allclose(
        by_numba, reference(base, basis, field, form), rtol=0, atol=2e-5 * scale
    )


@given(problem=problems(), cut=st.integers(0, 3000))
@settings(max_examples=30, deadline=None)
def test_a_part_alone_gives_the_bits_of_the_whole(problem: Any, cut: int) -> None:
    base, basis, field = problem
    cut = 1 + cut % max(field.size - 1, 1)
    whole = merged(base, basis, field, "interpolation")
    for start, stop in ((0, cut), (cut, field.size)):
        if start < stop:
            part = merged(
                base[start:stop], basis[:, start:stop], field.restrict(start, stop), "interpolation"
            )
            assert same_bits(part, whole[start:stop])


@given(problem=problems(), edges=st.lists(st.integers(0, 2999), max_size=6))
@settings(max_examples=30, deadline=None)
def test_refining_a_field_changes_no_bit(problem: Any, edges: list[int]) -> None:
    base, basis, field = problem
    finer = field.refine([edge % field.size for edge in edges])
    for kernel in KERNELS:
        assert same_bits(
            merged(base, basis, field, kernel=kernel), merged(base, basis, finer, kernel=kernel)
        )


@given(problem=problems(), one=st.floats(-2, 2), other=st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_linear_in_the_coefficients(problem: Any, one: float, other: float) -> None:
    base, basis, field = problem
    second = Field(field.boundaries, field.values[:, ::-1])
    mixed = Field(field.boundaries, one * field.values + other * second.values)
    change = [merged(base, basis, f).astype(np.float64) - base for f in (field, second, mixed)]
    scale = 1 + (abs(one) + abs(other)) * np.abs(field.values).sum()
    np.testing.assert_allclose(
        change[2], one * change[0] + other * change[1], rtol=0, atol=1e-5 * scale
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(kernel: Kernel, threads: int) -> None:
    size = numba_kernel.SHORTEST_TASK * 3 + 17  # several tasks, the last one short
    generator = np.random.default_rng(0)
    base, *basis = generator.standard_normal((4, size), dtype=np.float32)
    field = Field(np.array([0, 1000, size // 2, size]), generator.standard_normal((3, 3)))
    before = torch.get_num_threads()
    many = merged(base, basis, field, kernel=kernel, threads=threads)
    assert torch.get_num_threads() == before
    assert same_bits(many, merged(base, basis, field, kernel=kernel, threads=1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_change_no_bit(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *basis = np.random.default_rng(1).standard_normal((6, 5000), dtype=np.float32)
    field = Field.constant(5000, [0.1, -0.2, 0.3, 0.4, 0.5])
    whole = merged(base, basis, field, kernel=kernel)
    monkeypatch.setattr(torch_kernel, "CPU_BLOCK", 333)
    monkeypatch.setattr(
        numba_kernel,
        "stretches",
        lambda size, _: [(i, min(i + 777, size)) for i in range(0, size, 777)],
    )
    assert same_bits(merged(base, basis, field, kernel=kernel, threads=2), whole)


@pytest.mark.parametrize("form", ["delta", *ELECTIONS])
@pytest.mark.parametrize("directions", [4, 5, 16])
def test_long_blocks_of_many_rows_change_no_bit(form: Form, directions: int) -> None:
    size = 2 * numba_kernel.LONG_BLOCK + 77
    generator = np.random.default_rng(directions)
    base, *basis = generator.standard_normal((directions + 1, size), dtype=np.float32)
    values = generator.uniform(-1, 1, (directions, 2))
    values[1, 1] = 0
    field = Field(np.array([0, 1000, size]), values)
    by_numba, by_torch = (merged(base, basis, field, form, kernel=kernel) for kernel in KERNELS)
    assert same_bits(by_numba, by_torch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_coefficients_give_the_base_to_the_bit(kernel: Kernel) -> None:
    base = np.array([1.0, -0.0, 0.0, 1e-45, -3e38, np.inf, np.nan], np.float32)
    basis = np.full((5, base.size), np.nan, np.float32)  # would show if it were read
    for form in FORMS:
        assert same_bits(
            merged(base, basis, Field.constant(base.size, np.zeros(5)), form, kernel=kernel), base
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chosen", [0, 3, 8])
def test_one_hot_interpolation_gives_the_row_to_the_bit(kernel: Kernel, chosen: int) -> None:
    basis = np.full((9, 4), np.nan, np.float32)
    basis[chosen] = [-0.0, 1e-45, 2.5, np.inf]
    base = np.full(4, np.nan, np.float32)
    field = Field.constant(4, np.eye(9)[chosen])
    assert same_bits(merged(base, basis, field, "interpolation", kernel=kernel), basis[chosen])


@pytest.mark.parametrize("count", [3, 6, 7, 10, 49])
def test_uniform_interpolation_leaves_the_base_out(count: int) -> None:
    assert term_weights(Field.constant(4, [1 / count] * count), "interpolation")[0, 0] == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_coefficients_that_are_not_finite_pass_through(kernel: Kernel, bad: float) -> None:
    base = np.ones(6, np.float32)
    basis = np.ones((2, 6), np.float32)
    field = Field(np.array([0, 2, 6]), np.array([[0.5, bad], [0.5, 0.5]]))
    for form in FORMS:
        out = merged(base, basis, field, form, kernel=kernel)
        assert np.isfinite(out[:2]).all()
        assert not np.isfinite(out[2:]).any()


def test_products_and_sums_round_separately() -> None:
    # 1 + 2^-12 squared is 1 + 2^-11 + 2^-24: rounded alone it loses the last term, a fused
    # operation would keep it.
    factor = np.float32(1 + 2**-12)
    basis = np.full((1, 64), factor, np.float32)
    base = np.full(64, -1 - 2**-11, np.float32)
    for kernel in KERNELS:
        assert not merged(base, basis, Field.constant(64, [factor]), kernel=kernel).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_accumulate_in_fp32_and_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *rows = torch.randn((5, 1000), generator=generator).to(dtype)
    field = Field.constant(1000, [0.3, 0.1, -0.7, 0.9])
    out = torch.empty(1000, dtype=dtype)
    combine(base, rows, field, "delta", out)
    wide = torch.empty(1000)
    combine(base.float(), [row.float() for row in rows], field, "delta", wide)
    assert torch.equal(out, wide.to(dtype))


def test_float64_accumulates_in_float64() -> None:
    generator = np.random.default_rng(2)
    base, *basis = generator.standard_normal((4, 100))
    field = Field.constant(100, [0.1, 0.2, 0.3])
    out = np.empty(100)
    combine(base, basis, field, "interpolation", out)
    np.testing.assert_allclose(
        out, reference(base, np.array(basis), field, "interpolation"), rtol=1e-14, atol=1e-14
    )


def test_reads_torch_tensors_memmaps_and_strided_rows(tmp_path: Path) -> None:
    base, *rows = np.random.default_rng(3).standard_normal((3, 500), dtype=np.float32)
    field = Field.constant(500, [0.25, 0.5])
    expected = merged(base, rows, field)
    np.array(rows).tofile(tmp_path / "basis")
    mapped = np.memmap(tmp_path / "basis", dtype=np.float32, mode="r", shape=(2, 500))
    out = torch.empty(500)
    combine(torch.from_numpy(base), mapped, field, "delta", out)
    assert same_bits(out.numpy(), expected)
    assert same_bits(merged(base, mapped, field, kernel="torch"), expected)
    assert same_bits(merged(base, np.ascontiguousarray(np.array(rows).T).T, field), expected)


def test_out_may_be_the_base() -> None:
    base, *rows = np.random.default_rng(4).standard_normal((6, 4000), dtype=np.float32)
    field = Field.constant(4000, [0.1, 0.2, 0.3, 0.4, 0.5])
    for kernel in KERNELS:
        out = base.copy()
        combine(out, rows, field, "delta", out, kernel=kernel)
        assert same_bits(out, merged(base, rows, field, kernel=kernel))


def test_refuses_what_does_not_fit() -> None:
    base = np.ones(8, np.float32)
    basis = np.ones((2, 8), np.float32)
    out = np.ones(8, np.float32)
    with pytest.raises(RecipeError, match="expected a field of 2 directions, received 3"):
        combine(base, basis, Field.constant(8, [0, 0, 0]), "delta", out)
    with pytest.raises(InputError, match=r"row 0 of shape \(9,\)"):
        combine(
            np.ones(9, np.float32),
            basis,
            Field.constant(9, [0, 0]),
            "delta",
            np.ones(9, np.float32),
        )
    with pytest.raises(InputError, match="kernel 'numba' expects contiguous float32"):
        combine(
            base.astype(np.float64), basis, Field.constant(8, [0, 0]), "delta", out, kernel="numba"
        )


@pytest.mark.parametrize(
    ("value", "threads"), [("3", 3), ("2,4", 2), ("", 1), ("many", 1), ("0", 1)]
)
def test_threads_come_from_the_environment(
    value: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == threads


@pytest.mark.slow
def test_compiles_where_nothing_can_be_cached() -> None:
    """A read-only install of a user without a home: numba then has no place for its cache."""
    code = (
        "import numba\n"
        "real = numba.njit\n"
        "def njit(*signature, cache=False, **options):\n"
        "    if cache: raise RuntimeError('cannot cache function: no locator available')\n"
        "    return real(*signature, **options)\n"
        "numba.njit = njit\n"
        "import numpy as np\n"
        "from mergesearch.merging import Field\n"
        "from mergesearch.merging.kernels import "
        "combine\n"
        "out = np.empty(4, np.float32)\n"
        "combine(np.ones(4, np.float32), np.ones((1, 4), np.float32), Field.constant(4, [2]), "
        "'delta', out)\n"
        "assert (out == 3).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_light_imports_load_neither_torch_nor_numba() -> None:
    code = (
        "import sys, mergesearch.merging.kernels, mergesearch.merging.operators\n"
        "heavy = {'torch', 'numba', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def elected(terms: np.ndarray, sizes: np.ndarray, form: Form) -> np.ndarray:
    """The definition of an election, position by position.

    ``terms`` and ``sizes`` are ``(K, n)``.
    """
    result = np.zeros(terms.shape[1])
    for i, (column, weights) in enumerate(zip(terms.T, sizes.T, strict=True)):
        agree = np.sign(column) * np.sign(column.sum()) > 0
        if agree.any():
            kept = column[agree]
            result[i] = {
                "elect_sum": kept.sum(),
                "elect_mean": kept.mean(),
                "elect_weighted": kept.sum() / weights[agree].sum(),
                "elect_max": kept[np.abs(kept).argmax()],
            }[form]
    return result


@pytest.mark.parametrize("form", ELECTIONS)
@given(seed=st.integers(0, 2**32 - 1), directions=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_elections_agree_with_the_definition_and_to_the_bit(
    form: Form, seed: int, directions: int
) -> None:
    generator = np.random.default_rng(seed)
    base = generator.integers(-8, 9, 2500).astype(np.float32)
    # Small whole numbers and quarters: sums are exact, so that no sign hangs on rounding.
    basis = generator.integers(-4, 5, (directions, 2500)).astype(np.float32)
    field = Field(np.array([0, 700, 1900, 2500]), generator.integers(-3, 8, (directions, 3)) / 4)
    by_numba, by_torch = (merged(base, basis, field, form, kernel=kernel) for kernel in KERNELS)
    assert same_bits(by_numba, by_torch)
    coefficients = field.at(np.arange(field.size))
    expected = base + elected(coefficients * basis, np.abs(coefficients), form)
    np.testing.assert_allclose(by_numba, expected, rtol=0, atol=1e-5)
    assert same_bits(merged(base, basis, field, form, threads=2), by_numba)


@pytest.mark.parametrize("form", ELECTIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_elections_do_not_hide_coefficients_that_are_not_finite(
    form: Form, kernel: Kernel, value: float
) -> None:
    base = np.ones(3, np.float32)
    basis = np.ones((2, 3), np.float32)
    assert np.isnan(merged(base, basis, Field.constant(3, [value, 0.5]), form, kernel=kernel)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_slerp_walks_the_arc_of_every_tensor(kernel: Kernel) -> None:
    generator = np.random.default_rng(0)
    base, row = generator.standard_normal((2, 12), dtype=np.float32)
    angle = np.arccos(base[:8] @ row[:8] / np.linalg.norm(base[:8]) / np.linalg.norm(row[:8]))
    angles = Field(
        np.array([0, 8, 12]), np.array([[angle, 0.0]])
    )  # the second tensor takes the straight line
    field = Field(np.array([0, 4, 12]), np.array([[0.3, 0.8]]))
    out = merged(base, row[None], field, "slerp", angles=angles, kernel=kernel)
    t = field.at(np.arange(12))[0]
    arc = (np.sin((1 - t) * angle) * base + np.sin(t * angle) * row) / np.sin(angle)
    np.testing.assert_allclose(out[:8], arc[:8], rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[8:], (0.2 * base + 0.8 * row)[8:], rtol=0, atol=1e-6)
    for end, exact in ((0.0, base), (1.0, row)):
        assert same_bits(
            merged(base, row[None], Field.constant(12, [end]), "slerp", angles=angles), exact
        )


def test_slerp_needs_one_row_and_its_angles() -> None:
    base = np.ones(4, np.float32)
    for rows, angles in ((1, None), (1, Field.constant(3, [0.1])), (2, Field.constant(4, [0.1]))):
        with pytest.raises(RecipeError, match="expected one row and its angles"):
            merged(
                base,
                np.ones((rows, 4), np.float32),
                Field.constant(4, [0.5] * rows),
                "slerp",
                angles=angles,
            )
