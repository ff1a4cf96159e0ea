"""PCB against the formulas of its three variants, with a full sort of the model in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.tensors.memo import Memo

State = dict[str, torch.Tensor]
Array = npt.NDArray[np.float64]
SHAPES = {
    "block.0.weight": (16, 10),
    "block.1.weight": (12, 9),
    "norm.bias": (11,),
    "empty": (0, 3),
    "scale": (),
}
VARIANTS = ["vision", "evolution", "language"]


def family(
    experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    tuned = [
        {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(experts)
    ]
    return base, [{name: tensor.to(dtype) for name, tensor in state.items()} for state in tuned]


def pcb(base: State, experts: list[State], coefficients: Any = None, **options: Any) -> State:
    return merge(base, experts, operator="pcb", coefficients=coefficients, **options)


def flat(state: State) -> Array:
    return np.concatenate([tensor.double().numpy().reshape(-1) for tensor in state.values()])


def normalised(rows: Array) -> Array:
    low = rows.min(axis=1, keepdims=True)
    high = rows.max(axis=1, keepdims=True)
    return (rows - low) / (high - low)


def clamped(rows: Array, low: float, high: float) -> Array:
    ordered = np.sort(rows, axis=1)
    count = rows.shape[1]
    return np.clip(rows, ordered[:, [int(count * low)]], ordered[:, [int(count * (1 - high) - 1)]])


def reference(tau: Array, variant: str, ratio: float, clip: float, coefficients: Array) -> Array:
    """The merged task vector of ``(K, n)`` task vectors."""
    sizes = clamped(np.abs(tau), clip, clip)
    signed = np.sign(tau) * normalised(sizes)
    inter = {
        "vision": np.tanh(tau * signed.sum(axis=0)),
        "evolution": np.stack([sum(np.tanh(one * other) for other in signed) for one in signed]),
        "language": np.tanh(tau * tau.sum(axis=0)),
    }[variant]
    balanced = np.exp(len(tau) * normalised(sizes) ** 2) * inter
    scale = normalised(clamped(balanced, 1 - ratio, 0))
    terms = coefficients[:, None] * np.sign(tau) * sizes * scale
    return terms.sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("ratio", "clip"), [(0.05, 0.01), (0.2, 0.0), (1.0, 0.1)])
def test_agrees_with_the_formula(variant: str, ratio: float, clip: float) -> None:
    base, experts = family()
    merged = pcb(base, experts, [1.2, 0.9, 1.0], variant=variant, ratio=ratio, clip=clip)
    tau = np.stack([flat(expert) for expert in experts]) - flat(base)
    expected = reference(tau, variant, ratio, clip, np.array([1.2, 0.9, 1.0]))
    assert np.allclose(flat(merged) - flat(base), expected, rtol=0, atol=2e-6)
    assert np.count_nonzero(expected) >= 0.9 * ratio * tau.shape[1]


def test_is_by_default_the_vision_variant_with_1_2_for_every_expert() -> None:
    base, experts = family(5)
    tau = np.stack([flat(expert) for expert in experts]) - flat(base)
    expected = reference(tau, "vision", 0.05, 0.01, np.full(5, 1.2))
    assert np.allclose(flat(pcb(base, experts)) - flat(base), expected, rtol=0, atol=2e-6)


def test_one_expert_is_not_restored_only_its_top_entries_clipped() -> None:
    base, [expert] = family(1)
    tau = flat(expert) - flat(base)
    change = flat(pcb(base, [expert], 1.0)) - flat(base)
    kept = change != 0
    assert kept.sum() == len(tau) - 1 - int(len(tau) * 0.95)  # those above the quantile
    assert np.abs(tau[kept]).min() > np.abs(tau[~kept]).max()
    limit = np.sort(np.abs(tau))[int(len(tau) * 0.99 - 1)]
    assert np.allclose(change[kept], np.sign(tau[kept]) * np.minimum(np.abs(tau[kept]), limit))


def test_many_experts_do_not_overflow() -> None:
    base, [one, other] = family(2, dtype=torch.float32)
    merged = pcb(base, [one, other] * 45)  # exp(90) does not fit fp32
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_without_competition_is_no_division_by_zero(variant: str) -> None:
    base, [one, other] = family(2)
    shifted = {name: tensor + 0.5 for name, tensor in base.items()}  # one magnitude everywhere
    merged = pcb(base, [one, dict(base), other, shifted], variant=variant)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    single = {"w": torch.ones(1)}
    assert torch.equal(pcb(single, [{"w": torch.zeros(1)}], variant=variant)["w"], single["w"])


def test_names_the_tensor_that_is_not_finite() -> None:
    base, experts = family()
    experts[1]["norm.bias"][3] = torch.nan
    with pytest.raises(CheckpointError, match=r"expert '1': tensor 'norm.bias'"):
        pcb(base, experts)


@pytest.mark.parametrize(
    ("option", "value"), [("ratio", 0.0), ("ratio", 5), ("clip", 0.5), ("variant", "nlp")]
)
def test_refuses_options_outside_the_schema(option: str, value: Any) -> None:
    base, experts = family()
    with pytest.raises(RecipeError, match=f"operator pcb: hyperparameter '{option}'"):
        pcb(base, experts, **{option: value})


@dataclass
class Source:
    """A source with a memo, which counts how often tensors are read."""

    name: str
    tensors: State
    memo: Memo
    reads: int = 0

    @property
    def identity(self) -> str:
        return self.name

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.reads += 1
        return self.tensors[name]


def test_statistics_are_shared_between_hyperparameters(tmp_path: Path) -> None:
    base, experts = family(2)

    def rows(folder: str, *ratios: float) -> tuple[list[torch.Tensor], int]:
        sources = [
            Source(str(i), state, Memo(tmp_path / folder))
            for i, state in enumerate([base, *experts])
        ]
        for ratio in ratios:
            before = sources[1].reads
            basis = OPERATORS["pcb"].prepare(sources[0], sources[1:], ratio=ratio)
        return basis.rows("block.0.weight"), (sources[1].reads - before) // len(SHAPES)

    alone, reads = rows("a", 0.1)
    shared, second = rows("b", 0.2, 0.1)
    repeated, third = rows("b", 0.1)
    assert all(
        torch.equal(x, y) and torch.equal(x, z)
        for x, y, z in zip(alone, shared, repeated, strict=True)
    )
    assert second < reads
    assert third == 0
