"""The learned mask: its gradient against autograd, what it is for, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators import concrete, get_operator
from tests.merging.operators.calibrated import Model, batches, images, save_items
from tests.merging.operators.pico_runs import deltas_of, rows_of


def states(experts: int = 2) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in Model().state_dict().items()
    }
    return base, [
        {
            name: tensor + torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        for _ in range(experts)
    ]


def calibrated(experts: int = 2) -> Calibration:
    return Calibration(Model(), {str(index): batches(f"items {index}") for index in range(experts)})


merged_with = partial(merge, operator="concrete")


def entropy(state: dict[str, torch.Tensor], experts: int = 2) -> float:
    """Mean entropy of the answers to all items, in fp64."""
    model = Model().double()
    model.load_state_dict(state)
    items = torch.cat(
        [batch["inputs"] for index in range(experts) for batch in batches(f"items {index}")]
    )
    with torch.no_grad():
        p = model(items.double()).softmax(dim=1)
    return float(-(p * p.log()).sum(dim=1).mean())


def test_unlearned_it_is_task_arithmetic() -> None:
    base, experts = states()
    masked = merged_with(base, experts, calibration=calibrated(), steps=0)
    plain = merge(base, experts, operator="task_arithmetic", coefficients=0.3)
    assert all(torch.equal(masked[name], plain[name]) for name in base)


def test_learns_to_be_sure() -> None:
    base, experts = states()
    options = {"calibration": calibrated(), "learning_rate": 0.05}
    before, after = (
        entropy(merged_with(base, experts, steps=steps, **options)) for steps in (0, 80)
    )
    assert after < 0.9 * before


def test_scales_every_task_vector_by_one_mask_of_mean_one() -> None:
    base, experts = states(3)
    options = get_operator("concrete").complete(
        {"calibration": calibrated(3), "steps": 20, "learning_rate": 0.05}
    )
    sources = [
        MappingSource(str(index), tensors, list(base)) for index, tensors in enumerate(experts)
    ]
    rows = concrete.prepare(MappingSource("base", base, list(base)), sources, **options).rows
    for name, tensor in base.items():
        masks = [
            row / (expert[name] - tensor) for row, expert in zip(rows(name), experts, strict=True)
        ]
        assert all(torch.allclose(mask, masks[0], rtol=1e-3) for mask in masks)
        assert float(masks[0].mean()) == pytest.approx(1, abs=1e-3)
        assert bool((masks[0] > 0).all())
        assert tensor.numel() == 1 or float(masks[0].std()) > 1e-3


def test_gradient_is_that_of_autograd() -> None:
    """The gradient of the logits, from that of the weights that they mask."""
    base, experts = states()
    runner = ExpertRunner(calibrated(), MappingSource("base", base, list(base)))
    name = "block.0.weight"
    temperature = 0.5
    generator = torch.Generator().manual_seed(0)
    change = experts[0][name]
    whole = torch.randn(base[name].shape, generator=generator)
    logits = torch.randn(change.shape, generator=generator, requires_grad=True)
    mask = concrete._drawn(logits, temperature, 0, 0, name)
    (whole * change * mask / mask.mean()).sum().backward()
    runner.tensors[runner.views[name].parameter].grad = whole
    gradient = concrete._gradient(runner, name, change, mask.detach(), temperature)
    assert gradient is not None
    assert logits.grad is not None
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_first_step_goes_against_the_gradient_of_all_entropies() -> None:
    base, experts = states()
    state = {}
    for name, tensor in base.items():
        mask = concrete._drawn(torch.zeros_like(tensor), 0.5, 0, 0, name).double()
        change = 0.3 * sum(expert[name].double() - tensor.double() for expert in experts)
        state[name] = tensor.double() + change * mask / mask.mean()
    mean = torch.tensor(0.0, dtype=torch.float64)
    name = "column"
    logits = torch.zeros_like(base[name], dtype=torch.float64, requires_grad=True)
    mask = concrete._drawn(logits, 0.5, 0, 0, name)
    change = 0.3 * sum(expert[name].double() - base[name].double() for expert in experts)
    state[name] = base[name].double() + change * mask / mask.mean()
    for index in range(2):
        x = batches(f"items {index}")[0]["inputs"].double()  # step 0: the first batch of each
        p = torch.func.functional_call(Model().double(), state, (x,)).softmax(dim=1)
        mean = mean - (p * p.log()).sum(dim=1).mean()
    mean.backward()
    assert logits.grad is not None
    rate = 1e-2
    learned = merged_with(
        base,
        experts,
        calibration=calibrated(),
        steps=1,
        learning_rate=rate,
        coefficients=[1.0, 0.0],
    )
    mask = (-rate * logits.grad / (logits.grad.abs() + 1e-8) / 0.5).sigmoid()  # Adam's first step
    expected = base[name].double() + mask / mask.mean() * (
        experts[0][name].double() - base[name].double()
    )
    assert torch.allclose(learned[name].double(), expected, atol=1e-5)
    assert len(set(logits.grad.sign().flatten().tolist())) == 2


def test_seeds_differ_and_repeat() -> None:
    base, experts = states()
    options = {"calibration": calibrated(), "steps": 5, "learning_rate": 0.05}
    one, again, other = (merged_with(base, experts, seed=seed, **options) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in base)
    assert not torch.equal(one["block.0.weight"], other["block.0.weight"])


def test_masks_a_vit_from_its_checkpoints(pico: Callable[[str], Any], tmp_path: Path) -> None:
    family = pico("vit")
    own = {
        "data": str(save_items(tmp_path / "items", images(8, 0))),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "batch_size": 3,
    }
    options = {"calibration": own, "steps": 4, "learning_rate": 0.1}
    rows = rows_of(family.base, family.experts, "concrete", tmp_path / "arenas", **options)
    again = rows_of(family.base, family.experts, "concrete", tmp_path / "elsewhere", **options)
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    deltas = deltas_of(family.base, family.experts)[name]
    masks = rows[name] / deltas
    clear = deltas.abs().min(dim=0).values > 1e-3
    assert torch.allclose(masks[0][clear], masks[1][clear], rtol=1e-3)
    assert float(masks[0][clear].std()) > 0.01
    assert all(torch.equal(tensor, again[n]) for n, tensor in rows.items())


def test_default_is_the_scale_that_it_was_learned_at() -> None:
    operator = get_operator("concrete")
    assert operator.default(4, {"scale": 0.2}) == 0.2
    with pytest.raises(
        RecipeError, match=r"'temperature': Input should be greater than 0, received 0\.0"
    ):
        operator.complete({"calibration": calibrated(), "temperature": 0.0})


@pytest.mark.parametrize("inner", ["task", "tensor"])
def test_inner_step_goes_down_the_gradient_of_the_coefficients(inner: str) -> None:
    """λ_k from a plain autograd over coefficients, under a fixed mask."""
    base, experts = states()
    runner = ExpertRunner(calibrated(), MappingSource("base", base, list(base)))
    sources = [MappingSource(str(k), state, list(base)) for k, state in enumerate(experts)]
    learning = concrete._Learning(1, 0.1, 0.5, 0.3, 0, inner, 0.05)
    vectors = concrete._vectors(runner, sources, learning)
    generator = torch.Generator().manual_seed(5)
    masks = {
        name: torch.rand(terms[0].shape, generator=generator) + 0.1
        for name, terms in vectors.items()
    }
    items = [runner.items("0")[0], runner.items("1")[0]]
    changes = concrete._adapted(runner, vectors, masks, items, learning)

    count = len(vectors) if inner == "tensor" else 1
    weights = torch.full((2, count), 0.3, dtype=torch.float64, requires_grad=True)
    merged = {}
    for place, (name, terms) in enumerate(vectors.items()):
        ratio = (masks[name] / masks[name].mean()).double()
        own = weights[:, place if inner == "tensor" else 0]
        change = sum(w * ratio * term.double() for w, term in zip(own, terms, strict=True))
        merged[name] = base[name].double() + change
    model = Model().double()
    total = torch.tensor(0.0, dtype=torch.float64)
    for batch in items:
        inputs = {name: tensor.double() for name, tensor in batch.inputs.items()}
        log_p = torch.func.functional_call(model, merged, kwargs=inputs).log_softmax(dim=1)
        total = total - (log_p.exp() * log_p).sum(dim=1).mean()
    (slope,) = torch.autograd.grad(total, weights)
    after = 0.3 - 0.05 * slope
    assert float((after - 0.3).abs().max()) > 1e-3
    for place, (name, terms) in enumerate(vectors.items()):
        own = after[:, place if inner == "tensor" else 0]
        expected = sum(w * term.double() for w, term in zip(own, terms, strict=True))
        torch.testing.assert_close(changes[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["task", "tensor"])
def test_a_mask_learned_with_an_inner_level_is_another_and_is_sure(inner: str) -> None:
    base, experts = states()
    options = {"calibration": calibrated(), "learning_rate": 0.05, "inner_rate": 0.01}
    plain = merged_with(base, experts, steps=20, **options)
    adapted = merged_with(base, experts, steps=20, inner=inner, **options)
    unlearned = merged_with(base, experts, steps=0, **options)
    assert any(not torch.allclose(plain[name], adapted[name]) for name in base)
    assert entropy(adapted) < entropy(unlearned)
