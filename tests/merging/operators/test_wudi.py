"""WUDI's closed form against the gradient flow that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators import wudi as module
from mergesearch.merging.operators.parts.interference import spectrum_of
from mergesearch.merging.tensors.memo import Memo

Array = npt.NDArray[np.float64]
NAME = "layers.0.mlp.weight"


def task_vectors(shape: tuple[int, int], count: int = 3, seed: int = 0) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [scale * generator.standard_normal(shape) for scale in np.linspace(0.1, 0.3, count)]


def wudi(deltas: list[Array], *, name: str = NAME, **hyperparameters: float | str) -> Array:
    """What is added to a base of zeros in fp64, with every expert's coefficient 1."""
    base = {name: torch.zeros(deltas[0].shape, dtype=torch.float64)}
    experts = [{name: torch.from_numpy(delta)} for delta in deltas]
    return merge(base, experts, operator="wudi", **hyperparameters)[name].numpy()


def gradient(x: Array, deltas: list[Array]) -> Array:
    """Of ½ Σ ‖(X − τ) τᵀ‖² / ‖τ‖²."""
    return sum(((x - tau) @ tau.T @ tau / np.sum(tau**2) for tau in deltas), np.zeros_like(x))


def loss(x: Array, deltas: list[Array]) -> float:
    return float(sum(np.sum(((x - tau) @ tau.T) ** 2) / np.sum(tau**2) for tau in deltas))


def descended(start: Array, deltas: list[Array], time: float) -> Array:
    """Small explicit steps."""
    steps = max(2000, int(20 * time))
    for _ in range(steps):
        start = start - time / steps * gradient(start, deltas)
    return start


@pytest.mark.parametrize("shape", [(6, 5), (3, 20)], ids=["tall", "wide"])
@pytest.mark.parametrize(("start", "scale"), [("sum", 1.0), ("mean", 1 / 3), ("zero", 0.0)])
@pytest.mark.parametrize("time", [2.0, 300.0])
def test_is_gradient_flow(shape: tuple[int, int], start: str, scale: float, time: float) -> None:
    deltas = task_vectors(shape)
    expected = descended(scale * sum(deltas), deltas, time)
    assert np.abs(expected - scale * sum(deltas)).max() > 0.02
    np.testing.assert_allclose(wudi(deltas, time=time, keep=1.0, start=start), expected, atol=2e-4)


def test_only_the_largest_eigenvectors_move() -> None:
    deltas = task_vectors((8, 5))
    c = sum(tau.T @ tau / np.sum(tau**2) for tau in deltas)
    vectors = np.linalg.eigh(c)[1]
    # ⌈0.5 · 5⌉ = 3 of them; the others stay where the start has them.
    moved = vectors[:, -3:]
    kept = vectors[:, :-3]
    result = wudi(deltas, keep=0.5)
    whole = wudi(deltas, keep=1.0)
    np.testing.assert_allclose(result @ kept, sum(deltas) @ kept, atol=1e-9)
    np.testing.assert_allclose(result @ moved, whole @ moved, atol=1e-9)


@pytest.mark.parametrize("keep", [0.2, 0.65, 1.0])
def test_the_loss_falls_with_time(keep: float) -> None:
    deltas = task_vectors((7, 6))
    losses = [
        loss(sum(deltas), deltas),
        *(loss(wudi(deltas, time=time, keep=keep), deltas) for time in (1.0, 10.0, 1e6)),
    ]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_at_the_minimum_nothing_pulls() -> None:
    deltas = task_vectors((7, 6))
    assert np.abs(gradient(wudi(deltas, time=1e6, keep=1.0), deltas)).max() < 1e-9


def test_one_expert_is_left_alone_wherever_it_starts_from() -> None:
    (delta,) = task_vectors((6, 5), 1)
    np.testing.assert_allclose(wudi([delta]), delta, atol=1e-12)
    np.testing.assert_allclose(wudi([delta], start="zero", keep=1.0, time=1e6), delta, atol=1e-12)


def test_low_rank_task_vectors_stay_in_their_span() -> None:
    generator = np.random.default_rng(1)
    deltas = [
        generator.standard_normal((12, 2)) @ generator.standard_normal((2, 10)) for _ in range(3)
    ]
    span = np.linalg.svd(np.vstack(deltas))[2][:6]
    result = wudi(deltas, time=1e6, keep=1.0)
    np.testing.assert_allclose(result @ span.T @ span, result, atol=1e-9)
    assert np.abs(gradient(result, deltas)).max() < 1e-9


def test_participation_counts_the_singular_values_that_matter() -> None:
    deltas = [tau * 0.7 ** np.arange(7) for tau in task_vectors((8, 7))]
    stacked = np.vstack([tau / np.linalg.norm(tau) for tau in deltas])
    values = np.linalg.svd(stacked)[1]
    count = int(np.ceil(values.sum() ** 2 / (values**2).sum()))
    assert 1 < count < 7
    np.testing.assert_allclose(
        wudi(deltas, rank="participation"), wudi(deltas, keep=(count - 0.5) / 7), atol=1e-12
    )


def test_gavish_and_donoho_find_a_planted_rank_under_noise() -> None:
    generator = np.random.default_rng(0)
    signal = generator.standard_normal((3, 40))
    deltas = [
        generator.standard_normal((20, 3)) @ signal + 0.1 * generator.standard_normal((20, 40))
        for _ in range(2)
    ]
    tensors = [torch.from_numpy(tau) for tau in deltas]
    spectrum = spectrum_of(tensors, [float(np.sum(tau**2)) for tau in deltas])
    assert spectrum.sizes == (40, 40)
    assert module.chosen_rank(spectrum, "gavish_donoho") == 3
    assert module.chosen_rank(spectrum, "participation") > 3
    np.testing.assert_allclose(
        wudi(deltas, rank="gavish_donoho"), wudi(deltas, keep=2.5 / 40), atol=1e-12
    )


def test_equal_singular_values_all_count() -> None:
    spectrum = spectrum_of([torch.eye(7, dtype=torch.float64)], [7.0])
    assert module.chosen_rank(spectrum, "participation") == 7


def test_tensors_outside_the_blocks_are_averaged_unless_asked_for() -> None:
    deltas = task_vectors((6, 5))
    states = [
        {name: torch.tensor(delta) for name in (NAME, "head.weight")}
        for delta in [np.zeros_like(deltas[0]), *deltas]
    ]
    inside = wudi(deltas)
    for matrices, expected in (("blocks", np.mean(deltas, axis=0)), ("all", inside)):
        result = merge(states[0], states[1:], operator="wudi", matrices=matrices)
        np.testing.assert_allclose(result[NAME], inside, atol=1e-12)
        np.testing.assert_allclose(result["head.weight"], expected, atol=1e-12)


def test_small_eigenvalues_survive_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # Squares of singular values that differ by 1000 do not fit one fp32 number.
    deltas = [
        (delta * np.logspace(0, -3, 20)).astype(np.float32) for delta in task_vectors((30, 20))
    ]
    base = {NAME: torch.zeros(30, 20)}
    experts = [{NAME: torch.from_numpy(delta)} for delta in deltas]
    exact = wudi([delta.astype(np.float64) for delta in deltas], keep=1.0, time=1e7)
    monkeypatch.setattr("mergesearch.merging.operators.parts.decomposition.PRECISE_UP_TO", 10)
    single = merge(base, experts, operator="wudi", keep=1.0, time=1e7)[NAME]
    np.testing.assert_allclose(single, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert np.abs(sum(deltas) - exact).max() > 0.1 * np.abs(exact).max()


@dataclass(frozen=True)
class Source:
    name: str
    tensor: torch.Tensor
    memo: Memo

    @property
    def names(self) -> list[str]:
        return [NAME]

    @property
    def identity(self) -> str:
        return self.name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensor


def test_hyperparameters_share_the_eigenvectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [*task_vectors((6, 5)), np.zeros((6, 5))]
    memo = Memo(tmp_path)
    base = Source("base", torch.zeros(6, 5, dtype=torch.float64), memo)
    experts = [Source(str(k), torch.from_numpy(delta), memo) for k, delta in enumerate(deltas)]
    operator = get_operator("wudi")

    def total(**hyperparameters: float | str) -> Array:
        return sum(operator.prepare(base, experts, **hyperparameters).rows(NAME)).numpy()

    tried: list[dict[str, float | str]] = [
        {"keep": 0.2},
        {"start": "mean"},
        {"rank": "participation"},
        {"time": 10.0},
    ]
    expected = [wudi(deltas, **options) for options in tried]
    first = total(time=10.0)
    monkeypatch.setattr(
        module, "spectrum_of", None
    )  # would be called for eigenvectors that are not there
    for options, result in zip(tried, expected, strict=True):
        np.testing.assert_allclose(total(**options), result, atol=1e-12)
    assert np.array_equal(first, total(time=10.0))


def test_refuses_what_it_cannot_use() -> None:
    deltas = task_vectors((6, 5))
    with pytest.raises(
        RecipeError, match=r"operator wudi: hyperparameter 'keep': .*less than or equal to 1"
    ):
        wudi(deltas, keep=65.0)
    with pytest.raises(
        RecipeError, match=r"operator wudi: hyperparameter 'time': .*greater than 0"
    ):
        wudi(deltas, time=0.0)
    deltas[1][2, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.weight': expected finite numbers"):
        wudi(deltas)
