"""Merging state dicts: what stays, what is merged, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import CheckpointError, Field, Layout, RecipeError, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.in_memory import merge_stream

# Experts count their steps and batches; that merges say so is tested with the policies for special
# tensors.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

State = dict[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "steps": torch.tensor(seed),
        "layer.10.weight": torch.randn(4, 3, generator=generator).to(dtype),
        "layer.2.weight": torch.randn(4, 3, generator=generator).to(dtype),
        "mask": torch.tensor([True, seed % 2 == 0]),
        "scale": torch.randn((), generator=generator).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }


def test_keeps_order_copies_integers_and_leaves_inputs_alone() -> None:
    base = state(0)
    experts = [state(1), state(2)]
    before = [{name: t.clone() for name, t in s.items()} for s in (base, *experts)]
    result = merge(base, experts, coefficients=[0.5, 0.25])
    assert list(result) == list(base)
    assert result["steps"] == 0
    assert torch.equal(result["mask"], base["mask"])
    assert result["empty"].shape == (0, 3)
    for name in ("layer.10.weight", "layer.2.weight", "scale"):
        expected = (
            base[name]
            + 0.5 * (experts[0][name] - base[name])
            + 0.25 * (experts[1][name] - base[name])
        )
        torch.testing.assert_close(result[name], expected)
    for given_state, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(given_state[name], copy[name]) for name in copy)
    result["steps"].add_(5)
    result["layer.2.weight"].add_(1)
    assert all(torch.equal(base[name], before[0][name]) for name in base)


def test_experts_may_have_names() -> None:
    by_name = merge(state(0), {"first": state(1), "second": state(2)}, coefficients=[0.5, 0.25])
    in_order = merge(state(0), [state(1), state(2)], coefficients=[0.5, 0.25])
    assert all(torch.equal(by_name[name], in_order[name]) for name in in_order)


def test_tied_tensors_stay_tied() -> None:
    def tied(seed: int) -> State:
        weights = state(seed)
        return {**weights, "head": weights["layer.2.weight"], "half": weights["layer.2.weight"][:2]}

    result = merge(tied(0), [tied(1)], coefficients=0.5)
    assert result["head"] is result["layer.2.weight"]
    # A part of a tensor is a tensor of its own: merged to the same values, in its own memory.
    assert torch.equal(result["half"], result["head"][:2])
    assert result["half"].data_ptr() != result["head"].data_ptr()
    stored_apart = {name: t.clone() for name, t in tied(1).items()}
    assert torch.equal(merge(tied(0), [stored_apart], coefficients=0.5)["head"], result["head"])
    stored_apart["head"] += 1
    with pytest.raises(
        CheckpointError, match=r"expert 0: expected 'head' equal to 'layer\.2\.weight'"
    ):
        merge(tied(0), [stored_apart])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    base = state(0, dtype)
    expert = state(1)
    result = merge(base, [expert], operator="average", coefficients=1.0)
    for name in ("layer.2.weight", "scale"):
        assert torch.equal(result[name], expert[name].to(dtype))


def test_float64_bases_are_merged_in_float64() -> None:
    base = state(0, torch.float64)
    expert = state(1, torch.float64)
    result = merge(base, [expert], coefficients=0.1)["layer.2.weight"]
    expected = base["layer.2.weight"] + 0.1 * (expert["layer.2.weight"] - base["layer.2.weight"])
    torch.testing.assert_close(result, expected, rtol=1e-15, atol=1e-15)


def test_a_field_gives_each_tensor_its_own_coefficient() -> None:
    base = {"a": torch.zeros(70), "b": torch.zeros(5)}
    expert = {"a": torch.ones(70), "b": torch.ones(5)}
    layout = Layout.build({"a": ((70,), "float32"), "b": ((5,), "float32")})
    field = Field(
        np.array([0, 35, layout.by_name["b"].start, layout.size]), np.array([[0.25, 0.5, 0.75]])
    )
    result = merge(base, [expert], coefficients=field)
    assert result["a"].tolist() == [0.25] * 35 + [0.5] * 35
    assert result["b"].tolist() == [0.75] * 5


@given(
    coefficients=st.lists(st.floats(-1, 2, width=32), min_size=2, max_size=2),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_agrees_with_float64_arithmetic(coefficients: list[float], seed: int) -> None:
    base = state(seed)
    experts = [state(seed + 1), state(seed + 2)]
    result = merge(base, experts, coefficients=coefficients)
    for name in ("layer.10.weight", "scale"):
        origin = base[name].double()
        expected = origin + sum(
            c * (e[name].double() - origin) for c, e in zip(coefficients, experts, strict=True)
        )
        torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=1e-5)


def test_bad_coefficients_pass_through_as_nan() -> None:
    assert merge(state(0), [state(1)], coefficients=math.nan)["layer.2.weight"].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mask"), r"expert 1: .*missing \['mask'\], extra \[\]"),
        (lambda s: s.update(more=torch.ones(1)), r"missing \[\], extra \['more'\]"),
        (
            lambda s: s.update(scale=torch.ones(2)),
            r"tensor 'scale': expected float32 \(\) .*received float32 \(2,\)",
        ),
        (
            lambda s: s.update(scale=torch.tensor(1)),
            "tensor 'scale': expected float32 .*received int64",
        ),
    ],
)
def test_refuses_experts_that_do_not_fit(change: Callable[[State], Any], message: str) -> None:
    odd = state(2)
    change(odd)
    with pytest.raises(CheckpointError, match=message):
        merge(state(0), [state(1), odd])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": [0.1, 0.2]}, "coefficients: expected one number or 1, received 2"),
        ({"coefficients": Field.constant(3, [0.1])}, "field: expected 1 directions over"),
        ({"operator": "task_aritmetic"}, "did you mean 'task_arithmetic'"),
        ({"density": 0.2}, "unknown hyperparameter 'density', expected none"),
        ({"config": Layout}, "config: expected the content of config.json as a mapping, received "),
    ],
)
def test_refuses_recipes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merge(state(0), [state(1)], **options)


def test_refuses_models_in_the_place_of_their_states() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"base: .* received Linear; pass model.state_dict"):
        merge(cast(Any, model), [model.state_dict()])
    with pytest.raises(CheckpointError, match=r"expert 'a': expected a mapping.*received Linear"):
        merge(model.state_dict(), cast(Any, {"a": model}))


def test_refuses_to_merge_nothing_or_strange_floats() -> None:
    with pytest.raises(RecipeError, match="at least one expert"):
        merge(state(0), [])
    with pytest.raises(CheckpointError, match="at least one floating-point tensor"):
        merge({"steps": torch.tensor(1)}, [{"steps": torch.tensor(2)}])
    strange = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(CheckpointError, match="received complex64"):
        merge(strange, [strange])


def test_streams_real_checkpoints_to_the_bits_of_merged_state_dicts(
    pico: Callable[[str], Any],
) -> None:
    family = pico("llama_bf16")
    base, *experts = (open_checkpoint(str(path)) for path in (family.base, *family.experts))
    layout = Layout.build(base.merged)
    field = Field.constant(layout.size, [0.4, 0.2])
    streamed = list(merge_stream(base, experts, "average", {}, field, layout))
    assert tuple(name for name, _ in streamed) == layout.names
    states = [{name: source.read(name) for name in source.names} for source in (base, *experts)]
    merged = merge(states[0], states[1:], operator="average", coefficients=[0.4, 0.2])
    assert all(
        torch.equal(tensor, merged[name]) and tensor.dtype == torch.bfloat16
        for name, tensor in streamed
    )
