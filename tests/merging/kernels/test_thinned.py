"""Thinning and electing stored numbers: random bits of numpy, and the bits of rows made singly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import Field
from mergesearch.merging.kernels.chunks.draws import draw_bits, draw_mask
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.forms import MADE, Thinning
from mergesearch.merging.kernels.host import stored_numbers
from mergesearch.merging.kernels.thinned_numba import balance_thinned, merge_thinned
from mergesearch.merging.operators.parts.election import elect

KEY = 0xF234567890ABCDEF8122334455667788
LIMIT = 0.3
THINNINGS = {
    "trimmed": [Thinning(LIMIT)] * 3,
    "dropped": [Thinning(key=KEY ^ k, chance=1 << 30, factor=4.0) for k in range(3)],
    "dropped and trimmed": [Thinning(LIMIT, KEY + k, 3 << 29, 8 / 3) for k in range(3)],
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("counter", "size"), [(0, 1), (0, 64), (5, 1000), (2**40, 4096)])
def test_bits_are_those_of_numpy(counter: int, size: int) -> None:
    words = np.random.Philox(key=KEY, counter=counter).random_raw(-(-size // 8) * 4)
    expected = words.view(np.uint32)[:size]
    assert np.array_equal(draw_bits(KEY, counter, size), expected)
    if counter == 0:
        mask = np.empty(size, np.uint8)
        draw_mask(KEY, 1 << 31, mask)
        assert np.array_equal(mask, expected < 1 << 31)


def sources(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """A base and three experts with few different changes: many of them cancel exactly."""
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).to(dtype)
    changes = [0.25 * torch.randint(-3, 4, (size,), generator=generator) for _ in range(3)]
    return [base, *((base.float() + change).to(dtype) for change in changes)]


def rows(tensors: list[torch.Tensor], thinnings: list[Thinning]) -> list[torch.Tensor]:
    """Thinned task vectors, by torch and numpy."""
    thin = []
    for tensor, thinning in zip(tensors[1:], thinnings, strict=True):
        change = tensor.float() - tensors[0].float()
        if thinning.key is not None:
            words = np.random.Philox(key=thinning.key).random_raw(-(-len(change) // 8) * 4)
            kept = words.view(np.uint32)[: len(change)] < thinning.chance
            change = change.masked_fill(~torch.from_numpy(kept), 0.0) * thinning.factor
        thin.append(change.masked_fill(change.abs() < thinning.limit, 0.0))
    return thin


def expected(
    tensors: list[torch.Tensor], thin: list[torch.Tensor], rule: str, majority: int, field: Field
) -> torch.Tensor:
    """What the rows merge to, before rounding."""
    elected = elect([row.clone() for row in thin], rule, lambda: majority) if rule else thin
    out = torch.empty(len(tensors[0]))
    combine(tensors[0].float(), elected, field, "delta", out, threads=1)
    return out


def run(
    tensors: list[torch.Tensor],
    thinnings: list[Thinning],
    rule: str,
    majority: int,
    field: Field,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """(merged, outcome), stored as the base is."""
    out = torch.empty_like(tensors[0])
    weights = np.vstack([np.ones(field.segments), field.values]).astype(np.float32)
    numbers = [stored_numbers(tensor) for tensor in tensors]
    outcome = merge_thinned(
        numbers,
        thinnings,
        weights,
        field.boundaries,
        rule,
        majority,
        stored_numbers(out),
        **options,
    )
    return out, outcome


def cut(size: int) -> Field:
    """Coefficients with one 0, whose segments end inside chunks of the kernel."""
    edges = np.array([0, size]) if size < 9 else np.array([0, size // 3, size // 2, size])
    values = np.linspace(-0.7, 1.3, 3 * (len(edges) - 1)).reshape(3, -1)
    values[1, 0] = 0.0
    return Field(edges, values)


@pytest.mark.parametrize("size", [1, 63, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", list(THINNINGS))
@pytest.mark.parametrize("rule", ["", "mean", "sum", "max"])
def test_gives_the_bits_of_the_rows(size: int, dtype: torch.dtype, how: str, rule: str) -> None:
    tensors = sources(size, dtype)
    field = cut(size)
    thin = rows(tensors, THINNINGS[how])
    for majority in (1, -1, 0):
        exact = expected(tensors, thin, rule, majority, field)
        merged, outcome = run(tensors, THINNINGS[how], rule, majority, field)
        assert outcome.finite
        assert torch.equal(merged, exact.to(dtype))
        if dtype == torch.bfloat16:
            lost = float((merged.float() - exact).double().square().sum())
            change = float((exact - tensors[0].float()).double().square().sum())
            assert np.allclose([outcome.lost, outcome.change], [lost, change], rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["", "mean", "max"])
def test_vectors_thinned_before_are_merged_as_they_are(dtype: torch.dtype, rule: str) -> None:
    tensors = sources(1000, dtype)
    thin = rows(tensors, THINNINGS["dropped and trimmed"])
    field = cut(1000)
    exact = expected(tensors, thin, rule, 1, field)
    merged, outcome = run([tensors[0], *thin], [MADE] * 3, rule, 1, field)
    assert torch.equal(merged, exact.to(dtype))
    stored = run(tensors, THINNINGS["dropped and trimmed"], rule, 1, field)[1]
    assert (outcome.cancelled, outcome.balance) == (stored.cancelled, stored.balance)
    thin[1][70] = float("inf")
    assert not run([tensors[0], *thin], [MADE] * 3, rule, 1, field)[1].finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", list(THINNINGS))
@pytest.mark.parametrize("rule", ["mean", "sum", "max"])
def test_patches_turn_one_majority_into_the_other(dtype: torch.dtype, how: str, rule: str) -> None:
    tensors = sources(1000, dtype)
    for sign in (1, -1):
        merged, outcome = run(tensors, THINNINGS[how], rule, sign, cut(1000), notes=True)
        other, opposite = run(tensors, THINNINGS[how], rule, -sign, cut(1000))
        assert outcome.cancelled > 0
        assert not torch.equal(merged, other)
        if outcome.patches is None:  # more than may be noted
            continue
        numbers: npt.NDArray[Any] = stored_numbers(merged)  # type: ignore[assignment]
        numbers[outcome.patches.positions] = outcome.patches.numbers
        assert torch.equal(merged, other)
        sums = outcome.lost + outcome.patches.lost, outcome.change + outcome.patches.change
        assert np.allclose(sums, [opposite.lost, opposite.change], rtol=1e-4)


def test_few_cancellations_are_noted_and_many_are_not() -> None:
    tensors = sources(2000, torch.float32)
    _, many = run(tensors, [Thinning()] * 3, "mean", 1, cut(2000), notes=True)
    assert many.patches is None
    for tensor in tensors[2:]:  # one expert alone cancels nothing
        tensor[64:] = tensors[0][64:]
    merged, few = run(tensors, [Thinning()] * 3, "mean", 1, cut(2000), notes=True)
    assert 0 < len(few.patches.positions) <= few.cancelled <= 64
    stored_numbers(merged)[few.patches.positions] = few.patches.numbers  # type: ignore[index]
    assert torch.equal(merged, run(tensors, [Thinning()] * 3, "mean", -1, cut(2000))[0])


@pytest.mark.parametrize("how", list(THINNINGS))
def test_balance_is_that_of_the_rows(how: str) -> None:
    tensors = sources(1000, torch.bfloat16)
    total = torch.stack(rows(tensors, THINNINGS[how])).double().sum(0)
    signs = int(total.sign().sum())
    numbers = [stored_numbers(tensor) for tensor in tensors]
    assert balance_thinned(numbers, THINNINGS[how]) == signs
    assert run(tensors, THINNINGS[how], "sum", 1, cut(1000))[1].balance == signs


def test_signs_are_those_of_the_exact_sum() -> None:
    # In fp32 the sum of the first two terms is rounded, and the third cancels what is left of it.
    changes = torch.tensor([[1e8, -1e8, 1.0], [1e8, 1.0, -1e8], [1e-40, -1e-40, 1e-44]])
    tensors = [torch.zeros(3), *changes.T.contiguous()]
    field = Field.constant(3, [1.0, 1.0, 1.0])
    merged, outcome = run(tensors, [Thinning()] * 3, "sum", 1, field)
    assert torch.equal(merged, expected(tensors, tensors[1:], "sum", 1, field))
    assert outcome.balance == 3
    assert outcome.cancelled == 0


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", list(THINNINGS))
def test_what_is_not_finite_is_found_even_where_it_is_dropped(odd: float, how: str) -> None:
    for place in (0, 70, 99):
        tensors = sources(100, torch.float32)
        tensors[2][place] = odd
        assert not run(tensors, THINNINGS[how], "mean", 1, cut(100))[1].finite
        numbers = [stored_numbers(tensor) for tensor in tensors]
        assert balance_thinned(numbers, THINNINGS[how]) is None
