"""Estimates of preparing: their arithmetic, on shapes where it can be done by hand."""

from __future__ import annotations

import pytest

from mergesearch.merging.family.effort import (
    MATRIX_WORK,
    Work,
    all_vectors,
    largest_vectors,
    matrix_work,
    polar_factor,
    preparation_seconds,
    product,
)
from mergesearch.merging.family.rates import CARD_RATES, Rates, measured_rates
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.tensors.layout import Layout

LAYOUT = Layout.build({"w": ((8, 32), "bfloat16"), "b": ((100,), "bfloat16")})
#: 10 bytes, 10 operations, 10 of s³ in a second.
TENS = Rates(read=10, multiply=10, multiply_wide=10, few=10, every=10)


def llama_8b() -> Layout:
    """The shapes of Llama 3 8B."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 4096),
        "lm_head.weight": (128256, 4096),
    }
    for layer in range(32):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (1024, 4096) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (4096, 14336)
    return Layout.build({name: (shape, "bfloat16") for name, shape in shapes.items()})


def test_work_of_single_matrices() -> None:
    # Half a Gram matrix and a sixteenth of it for the diagonal blocks, then r of the long vectors.
    lower = 9 / 16
    assert largest_vectors((8, 32), 2) == Work(multiply=2 * 8 * 32 * (lower * 8 + 2), few=512)
    assert largest_vectors((32, 8), 5) == all_vectors((8, 32))
    assert all_vectors((8, 32)) == Work(multiply_wide=2 * 64 * 32 * (lower + 1), every=512)
    assert polar_factor((32, 8)) == Work(
        multiply=2 * 64 * 32, multiply_wide=2 * 64 * (lower * 32 + 8), every=512
    )
    assert product(2, 3, 5, 7) == Work(multiply=2 * (2 * 3 * 5 + 2 * 5 * 7))


def test_an_operator_without_matrices_reads() -> None:
    # Base and 3 experts, (8 * 32 + 100) elements of 2 bytes each, at 10 bytes a second.
    once = 4 * 356 * 2 / 10
    assert preparation_seconds(OPERATORS["task_arithmetic"], LAYOUT, 3, TENS) == once
    assert preparation_seconds(OPERATORS["ties"], LAYOUT, 3, TENS) == pytest.approx(3 * once)


def test_tsv_is_the_sum_of_its_parts() -> None:
    tsv = OPERATORS["tsv"]
    expected = (largest_vectors((8, 32), 2) + product(8, 2, 32)).times(4)
    expected += polar_factor((8, 8)) + polar_factor((32, 8)) + Work(moved=8 * 4 * 8 * 32)
    assert matrix_work(tsv, LAYOUT, 4, {}) == expected
    units = expected.multiply + expected.multiply_wide + expected.few + expected.every
    read = 5 * 356 * 2 / 10
    assert preparation_seconds(tsv, LAYOUT, 4, TENS) == pytest.approx(read + units / 10)
    two = preparation_seconds(tsv, LAYOUT, 4, TENS, threads=2)
    assert two == pytest.approx(read + units / 20)
    more = preparation_seconds(tsv, LAYOUT, 4, TENS, {"rank": "full"})
    assert more > preparation_seconds(tsv, LAYOUT, 4, TENS)


def test_every_spectral_operator_has_its_work() -> None:
    spectral = {name for name, each in OPERATORS.items() if each.family == "spectral"}
    assert spectral <= {*MATRIX_WORK} <= {*OPERATORS}
    for name in MATRIX_WORK:
        assert matrix_work(OPERATORS[name], llama_8b(), 4, {}) != Work(), name


def test_a_card_prepares_8b_in_minutes() -> None:
    tsv = OPERATORS["tsv"]
    seconds = preparation_seconds(tsv, llama_8b(), 4, CARD_RATES["h200-141"])
    assert 5 * 60 < seconds < 40 * 60
    moved = matrix_work(tsv, llama_8b(), 4, {}).moved
    assert moved == 8 * 4 * sum(s.size for s in llama_8b().tensors)


def test_rates_are_measured() -> None:
    rates = measured_rates(1e9, sample=64)
    assert rates.measured
    assert rates.move is None
    assert min(rates.multiply, rates.multiply_wide, rates.few, rates.every) > 0
