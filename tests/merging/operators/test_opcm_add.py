"""One more expert at a time against OPCM of all experts at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergesearch.merging import merge
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators.opcm_add import factor_after

State = dict[str, torch.Tensor]

SHAPES = {
    "layers.0.mlp.weight": (12, 8),
    "layers.1.mlp.weight": (6, 10),
    "layers.1.mlp.bias": (7,),
    "head.weight": (3, 4),
}
OPTIONS = {"alpha": 0.4, "matrices": "blocks", "conv": "others", "fused": "split"}


def family(count: int, dtype: torch.dtype, rank: int | None = None) -> tuple[State, list[State]]:
    """A base and experts, whose task vectors may be of low rank."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def change(shape: tuple[int, ...]) -> torch.Tensor:
        if rank is None or len(shape) < 2:
            return draw(*shape)
        return draw(shape[0], rank) @ draw(rank, shape[1])

    base = {name: draw(*shape) for name, shape in SHAPES.items()}
    experts = [
        {name: base[name] + 0.1 * (k + 1) * change(shape) for name, shape in SHAPES.items()}
        for k in range(count)
    ]
    states = [{n: t.to(dtype) for n, t in state.items()} for state in (base, *experts)]
    return states[0], states[1:]


def one_after_another(base: State, experts: list[State]) -> State:
    """OPCM with nothing kept but the merge, the number of experts and the factor."""
    merged = experts[0]
    factor = 1.0
    for joined, expert in enumerate(experts[1:], start=1):
        sources = [
            MappingSource(name, state, list(base))
            for name, state in {"base": base, "merged": merged, "new": expert}.items()
        ]
        following = factor_after(sources[0], sources[1:], joined, factor, **OPTIONS)
        merged = merge(
            base,
            {"merged": merged, "new": expert},
            operator="opcm_add",
            joined=joined,
            factor=factor,
            **OPTIONS,
        )
        factor = following
    return merged


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_is_opcm_of_all_experts_at_once(dtype: torch.dtype, close: float, rank: int | None) -> None:
    base, experts = family(5, dtype, rank)
    named = {f"task{k}": expert for k, expert in enumerate(experts)}
    whole = merge(base, named, operator="opcm", order=list(named), **OPTIONS)
    result = one_after_another(base, experts)
    for name in SHAPES:
        torch.testing.assert_close(result[name], whole[name], rtol=0, atol=close)


def test_a_merge_taken_for_a_single_expert_weighs_too_little() -> None:
    base, experts = family(4, torch.float64)
    named = {f"task{k}": expert for k, expert in enumerate(experts)}
    first = merge(base, dict(list(named.items())[:3]), operator="opcm", order=list(named)[:3])
    wrong = merge(base, {"merged": first, "new": experts[3]}, operator="opcm_add")
    whole = merge(base, named, operator="opcm", order=list(named))
    assert max(float((wrong[n] - whole[n]).abs().max()) for n in SHAPES) > 0.01


def test_the_norm_is_the_mean_norm() -> None:
    base, experts = family(2, torch.float64)
    result = merge(base, experts, operator="opcm_add")

    def length(state: State) -> float:
        return float(np.sqrt(sum(float((state[n] - base[n]).square().sum()) for n in SHAPES)))

    assert length(result) == pytest.approx(np.mean([length(e) for e in experts]), rel=1e-12)
