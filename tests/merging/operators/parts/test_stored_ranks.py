"""Thresholds counted from stored bits: those of differences, whatever a sample says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators.parts import stored_ranks
from mergesearch.merging.operators.parts.magnitudes import count_kept, kth_largest
from mergesearch.merging.operators.parts.stored_ranks import stored_thresholds

SHAPES = {"a": (300, 77), "b": (13,), "c": (100, 150), "d": (2, 3, 5)}
#: Elements that are sampled, the run, the margin and the deviations: helpful, misleading, none.
SAMPLES = {
    "good": (1, 16, 0.002, 10_000, 4.0),
    "misleading": (1, 64, 0.0, 100, 0.0),
    "of everything": (1, 1024, 0.2, 1 << 20, 4.0),
    "too vague": (1, 64, 0.5, 1000, 4.0),
    "none": (1 << 40, 64, 0.0, 1, 0.0),
}


def family(dtype: torch.dtype) -> list[MappingSource]:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).mul(0.02).to(dtype) for n, s in SHAPES.items()}
    states = [base]
    for k in range(3):
        scale = {name: 0.001 * (k + 1) * (5 if name == "c" else 1) for name in SHAPES}
        states.append(
            {
                n: (t.float() + scale[n] * torch.randn(t.shape, generator=generator)).to(dtype)
                for n, t in base.items()
            }
        )
    return [MappingSource(str(k), state, list(SHAPES)) for k, state in enumerate(states)]


def sampled(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    for name, value in zip(
        ("SAMPLED_FROM", "RUN", "MARGIN", "LEAST", "DEVIATIONS"), values, strict=True
    ):
        monkeypatch.setattr(stored_ranks, name, value)


@pytest.mark.parametrize("sample", list(SAMPLES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["a"], list(SHAPES)])
def test_thresholds_are_exact(
    sample: str, dtype: torch.dtype, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(monkeypatch, SAMPLES[sample])
    base, *experts = family(dtype)
    changes = [
        [(n, expert.read(n).float() - base.read(n).float()) for n in names] for expert in experts
    ]
    total = sum(change.numel() for _, change in changes[0])
    for density in (1e-9, 0.01, 0.2, 0.5, 0.999):
        rank = count_kept(density, total)
        expected = [kth_largest(lambda one=one: one, rank) for one in changes]
        assert stored_thresholds(base, experts, names, density) == expected


@pytest.mark.parametrize(("sample", "reads"), [("good", 2), ("misleading", 4), ("none", 2)])
def test_a_good_sample_saves_a_read(
    sample: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(monkeypatch, SAMPLES[sample])
    counted = stored_ranks._counted
    calls = []

    def watched(*arguments: object, **options: object) -> object:
        calls.append(options)
        return counted(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_ranks, "_counted", watched)
    base, *experts = family(torch.float32)
    stored_thresholds(base, experts, ["a"], 0.2)
    assert len(calls) == reads


@pytest.mark.parametrize("sample", ["good", "none"])
def test_what_is_not_finite_or_not_stored_so_is_left_to_others(
    sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(monkeypatch, SAMPLES[sample])
    base, *experts = family(torch.float32)
    experts[1].read("c")[3, 4] = float("nan")
    assert stored_thresholds(base, experts, list(SHAPES), 0.2) is None
    assert stored_thresholds(base, experts, ["a"], 0.2) is not None
    halves = family(torch.float16)
    assert stored_thresholds(halves[0], halves[1:], list(SHAPES), 0.2) is None
