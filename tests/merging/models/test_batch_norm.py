"""Running statistics recomputed on data: exact averages, everything else untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mergesearch.merging import InputError
from mergesearch.merging.models.batch_norm import recalibrate


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, **options)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


def batches() -> list[dict[str, torch.Tensor]]:
    return [
        {"x": 2 + 3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))}
        for seed in range(4)
    ]


def test_takes_the_plain_average_over_batches() -> None:
    model = Model(momentum=0.3).eval()
    model.norm.running_mean += 7
    recalibrate(model, batches())
    assert torch.allclose(
        model.norm.running_mean, torch.stack([b["x"].mean(dim=0) for b in batches()]).mean(dim=0)
    )
    assert torch.allclose(
        model.norm.running_var, torch.stack([b["x"].var(dim=0) for b in batches()]).mean(dim=0)
    )


def test_leaves_modes_momentum_and_weights_alone() -> None:
    model = Model(momentum=0.3).eval()
    before = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, batches())
    assert not any(module.training for module in model.modules())
    assert model.norm.momentum == 0.3
    assert all(
        torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)
    )


def test_restores_normalised_activations_of_a_real_model(
    build_model: Callable[..., nn.Module],
) -> None:
    model = build_model("resnet").eval()
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    layer = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    model(pixel_values=images)
    recalibrate(model, [{"pixel_values": images}])
    model(pixel_values=images)
    spread = [float(output.var(dim=(0, 2, 3)).mean()) for output in (seen[0], seen[-1])]
    assert abs(spread[0] - 1) > 0.2
    assert spread[1] == pytest.approx(1, abs=0.01)


def test_a_model_without_running_statistics_is_not_run() -> None:
    model = Model(track_running_stats=False)
    recalibrate(model, [{"no such argument": torch.zeros(1)}])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "expected batches to recompute running statistics on, received none"),
        (
            [{"x": torch.ones(2, 3)}, {"x": torch.ones(1, 3)}],
            "expected several values per channel .* in batch 2",
        ),
    ],
)
def test_what_fails_leaves_the_statistics_as_they_were(
    given: list[dict[str, torch.Tensor]], match: str
) -> None:
    model = Model().eval()
    model.norm.running_mean += 7
    with pytest.raises(InputError, match=match):
        recalibrate(model, given)
    assert torch.equal(model.norm.running_mean, torch.full((3,), 7.0))
    assert not model.norm.training
