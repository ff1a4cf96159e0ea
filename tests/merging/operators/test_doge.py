"""DOGE against the authors' steps, written out with torch's own gradients and Adam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.operators import doge, get_operator
from mergesearch.merging.tensors.memo import Memo

State = dict[str, torch.Tensor]

SHAPES = {
    "layers.0.q.weight": (8, 7),
    "layers.1.q.weight": (6, 9),
    "layers.1.norm.weight": (5,),
    "head.weight": (4, 6),
}
MATRICES = [name for name in SHAPES if name.endswith("q.weight")]


def states(count: int, seed: int = 0, scale: float = 0.1) -> list[State]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> State:
        return {
            name: scale * torch.randn(s, generator=generator, dtype=torch.float64)
            for name, s in SHAPES.items()
        }

    return [draw(0.0), *(draw(scale * (k + 1)) for k in range(count))]


def correction(
    vectors: torch.Tensor, scales: torch.Tensor, divisor: int, steps: int
) -> torch.Tensor:
    """δ for ``(K, m, n)`` task vectors."""
    size = min(vectors.shape[1:])
    first = [torch.linalg.svd(tau).U[:, : size // len(vectors)] for tau in vectors]
    shared = torch.linalg.svd(torch.cat(first, dim=1), full_matrices=False).U[:, : size // divisor]
    delta = torch.zeros_like(vectors[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        merged = sum(scale * (tau + delta) for scale, tau in zip(scales, vectors, strict=True))
        sum((tau * (tau - merged)).sum(1).square().sum() for tau in vectors).backward()
        delta.grad -= shared @ shared.T @ delta.grad
        optimiser.step()
    return delta.detach()


def expected(experts: list[State], eta: float, density: float, divisor: int, steps: int) -> State:
    thresholds = []
    for expert in experts:
        magnitudes = (
            torch.cat([expert[name].abs().reshape(-1) for name in MATRICES])
            .sort(descending=True)
            .values
        )
        thresholds.append(magnitudes[int(np.ceil(density * len(magnitudes))) - 1])
    result = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name in MATRICES:
        vectors = torch.stack([expert[name] for expert in experts])
        scales = eta / torch.linalg.matrix_norm(vectors)
        delta = correction(vectors, scales, divisor, steps)
        for scale, tau, threshold in zip(scales, vectors, thresholds, strict=True):
            result[name] += scale * (tau + delta) * (tau.abs() >= threshold)
    return result


@pytest.mark.parametrize(
    ("eta", "density", "divisor", "steps"), [(0.07, 0.3, 6, 400), (0.5, 0.9, 3, 30)]
)
def test_is_the_published_procedure(eta: float, density: float, divisor: int, steps: int) -> None:
    base, *experts = states(3)
    result = merge(
        base, experts, operator="doge", eta=eta, density=density, subspace=divisor, steps=steps
    )
    for name, tensor in expected(experts, eta, density, divisor, steps).items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-10)


def test_the_first_step_follows_the_sign_of_the_gradient_outside_the_shared_subspace() -> None:
    first, second = (expert["layers.0.q.weight"] for expert in states(2)[1:])
    shared = torch.linalg.qr(
        torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    for columns in (shared, shared[:, :0]):
        delta = doge.descend([first, second], [0.07, 0.05], columns, 1)
        start = torch.zeros_like(first, requires_grad=True)
        merged = 0.07 * (first + start) + 0.05 * (second + start)
        sum((tau * (tau - merged)).sum(1).square().sum() for tau in (first, second)).backward()
        assert start.grad is not None
        gradient = start.grad - columns @ columns.T @ start.grad
        torch.testing.assert_close(delta, -1e-4 * gradient.sign(), rtol=1e-2, atol=1e-12)


def test_without_steps_every_expert_has_the_length_eta_before_thinning() -> None:
    base, *experts = states(2)
    result = merge(
        base, experts, operator="doge", steps=0, density=1.0, eta=0.2, coefficients=[0.0, 1.0]
    )
    for name in MATRICES:
        torch.testing.assert_close(result[name], 0.2 * experts[1][name] / experts[1][name].norm())


def test_keeps_the_largest_elements_of_the_whole_model() -> None:
    base, *experts = states(2)
    experts[0]["layers.1.q.weight"] *= 1e-3  # none of these is among the largest
    result = merge(base, experts, operator="doge", density=0.3, coefficients=[1.0, 0.0])
    kept = {name: int((result[name] != 0).sum()) for name in SHAPES}
    total = sum(experts[0][name].numel() for name in MATRICES)
    assert kept == dict.fromkeys(SHAPES, 0) | {"layers.0.q.weight": int(np.ceil(0.3 * total))}


def test_leaves_all_but_matrices_of_blocks_at_the_base_unless_asked() -> None:
    base, *experts = states(2)
    result = merge(base, experts, operator="doge")
    assert [name for name in SHAPES if result[name].any()] == MATRICES
    result = merge(base, experts, operator="doge", matrices="all", others="mean")
    assert result["head.weight"].any()
    torch.testing.assert_close(
        result["layers.1.norm.weight"],
        torch.stack([e["layers.1.norm.weight"] for e in experts]).mean(0),
    )


def test_an_unchanged_expert_takes_no_part() -> None:
    base, *experts = states(2)
    one = merge(base, experts, operator="doge", subspace=2)
    other = merge(base, [experts[0], base, experts[1]], operator="doge", subspace=2)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Source:
    name: str
    tensors: Mapping[str, torch.Tensor]
    memo: Memo

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def identity(self) -> str:
        return self.name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def test_densities_share_the_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = Memo(tmp_path)
    base, *experts = (Source(str(k), state, memo) for k, state in enumerate(states(2)))
    operator = get_operator("doge")
    wanted = merge(
        base.tensors, [expert.tensors for expert in experts], operator="doge", density=0.7
    )
    sparse = operator.prepare(base, experts, density=0.1)
    for name in MATRICES:
        sparse.rows(name)
    monkeypatch.setattr(doge, "descend", None)  # would be called for a correction that is not there
    dense = operator.prepare(base, experts, density=0.7)
    for name in MATRICES:
        torch.testing.assert_close(sum(dense.rows(name)), wanted[name], rtol=0, atol=1e-12)


def test_refuses_what_it_cannot_use() -> None:
    base, *experts = states(2)
    with pytest.raises(
        RecipeError, match=r"operator doge: hyperparameter 'density': .*a fraction in \(0, 1\]"
    ):
        merge(base, experts, operator="doge", density=30)
    with pytest.raises(
        RecipeError, match=r"operator doge: hyperparameter 'subspace': .*greater than or equal to 1"
    ):
        merge(base, experts, operator="doge", subspace=0)
    experts[1]["layers.0.q.weight"][0, 0] = float("inf")
    with pytest.raises(
        CheckpointError, match=r"expert '1': tensor 'layers.0.q.weight': expected finite numbers"
    ):
        merge(base, experts, operator="doge")


def own_corrections(
    vectors: torch.Tensor, scales: torch.Tensor, divisor: int, steps: int
) -> list[torch.Tensor]:
    """δ_k for ``(K, m, n)`` task vectors, each a parameter of its own."""
    size = min(vectors.shape[1:])
    first = [torch.linalg.svd(tau).U[:, : size // len(vectors)] for tau in vectors]
    shared = torch.linalg.svd(torch.cat(first, dim=1), full_matrices=False).U[:, : size // divisor]
    own = [torch.zeros_like(tau, requires_grad=True) for tau in vectors]
    optimiser = torch.optim.Adam(own, lr=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        merged = sum(s * (tau + d) for s, tau, d in zip(scales, vectors, own, strict=True))
        sum((tau * (tau - merged)).sum(1).square().sum() for tau in vectors).backward()
        for delta in own:
            assert delta.grad is not None
            delta.grad -= shared @ shared.T @ delta.grad
        optimiser.step()
    return [delta.detach() for delta in own]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1e-3])
def test_own_corrections_are_those_of_the_variant_for_adamerging(
    scaled: bool, scale: float
) -> None:
    # Small task vectors have small gradients, on which Adam's epsilon tells the experts apart.
    base, *experts = states(3, scale=scale)
    options = {"density": 1.0, "subspace": 3, "steps": 60, "correction": "own", "scaled": scaled}
    coefficients = [0.5, 0.2, 0.9]
    result = merge(base, experts, operator="doge", coefficients=coefficients, **options)
    for name in MATRICES:
        vectors = torch.stack([expert[name] for expert in experts])
        scales = 0.07 / torch.linalg.matrix_norm(vectors)
        found = own_corrections(vectors, scales, 3, 60)
        lengths = scales if scaled else torch.ones(3, dtype=torch.float64)
        expected_ = sum(
            c * length * (tau + delta)
            for c, length, tau, delta in zip(coefficients, lengths, vectors, found, strict=True)
        )
        torch.testing.assert_close(result[name], expected_, rtol=0, atol=1e-9)
    if scale < 0.1:
        assert float((found[0] - found[2]).abs().max()) > 1e-5


def test_terms_of_their_own_length_start_at_three_tenths() -> None:
    operator = get_operator("doge")
    assert operator.default(3, operator.complete({"scaled": False})) == 0.3
    assert operator.default(3, operator.complete({})) == 1.0
