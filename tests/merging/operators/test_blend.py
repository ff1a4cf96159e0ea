"""The blend of operators: it begins at its leader's merge and ends at those of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergesearch.merging import RecipeError, merge

State = dict[str, torch.Tensor]
SHAPES = {"layers.0.mlp.up_proj.weight": (12, 9), "layers.1.q.weight": (7, 7), "norm.bias": (11,)}


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


BASE = state(0)
TUNED = {
    f"expert {seed}": {name: BASE[name] + 0.4 * tensor for name, tensor in state(seed).items()}
    for seed in (1, 2, 3)
}
MEMBERS = ["tsv", "iso_cts", "task_arithmetic"]
SCALES = [0.7, 1.5, 0.3]


def blended(values: list[float], **options: Any) -> State:
    chosen = {"members": MEMBERS, "scales": SCALES} | options
    return merge(BASE, TUNED, operator="blend", coefficients=values, **chosen)


def test_no_weight_is_the_leader_bit_for_bit() -> None:
    for values in ([0.7, 0.7, 0.7], [0.2, 0.9, -0.1]):
        led = merge(BASE, TUNED, operator="tsv", coefficients=values)
        merged = blended([*values, 0.0, 0.0])
        assert all(torch.equal(merged[name], led[name]) for name in SHAPES)


@pytest.mark.parametrize("place", [1, 2])
def test_a_weight_of_one_is_the_other_member(place: int) -> None:
    weights = [float(place == 1), float(place == 2)]
    other = merge(BASE, TUNED, operator=MEMBERS[place], coefficients=SCALES[place])
    merged = blended([0.7, 0.7, 0.7, *weights])
    for name in SHAPES:
        torch.testing.assert_close(merged[name], other[name], rtol=0, atol=2e-6)


def test_without_coefficients_members_have_their_defaults() -> None:
    other = merge(BASE, TUNED, operator="iso_cts")
    merged = blended([1.0, 1.0, 1.0, 1.0, 0.0], scales=[])
    for name in SHAPES:
        torch.testing.assert_close(merged[name], other[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": ["no_such"], "scales": []}, "expected names among"),
        ({"scales": [1.0]}, "expected one for each of 3 members, received 1"),
        ({"members": ["average", "tsv"], "scales": []}, "whose form is interpolation"),
        ({"members": ["tsv", "opcm"], "scales": []}, "'order' has no default"),
        ({"members": ["regmean"], "scales": []}, "'calibration' has no default"),
    ],
)
def test_refuses_members_that_it_cannot_blend(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merge(BASE, TUNED, operator="blend", **({"members": MEMBERS, "scales": SCALES} | options))
