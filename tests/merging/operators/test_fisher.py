"""Fisher merging against gradients taken one by one, on a toy model and on real ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergesearch.merging import InputError, RecipeError, merge
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators.fisher import _drawn, _information
from tests.merging.operators.calibrated import Model, calibration, images, save_items
from tests.merging.operators.pico_runs import as_stored, deltas_of, loaded, rows_of

FLOOR = 1e-6


class Linear(nn.Module):
    """Logits of ``classes`` classes from two numbers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, 2))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(
    classes: int, experts: int = 2
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = {"weight": random(classes, 2, seed=0), "unused": random(3, seed=1)}
    tuned = [
        {n: t + random(*t.shape, seed=10 * k + len(n)) for n, t in base.items()}
        for k in range(1, experts + 1)
    ]
    return base, tuned


def information(weight: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Fisher information of a linear model, in closed form.

    It is the mean over items of Σ_c p_c (1[c = i] − p_i)² x_j² = p_i (1 − p_i) x_j².
    """
    p = (items.double() @ weight.double().T).softmax(dim=1)
    return (p * (1 - p)).T @ items.double() ** 2 / len(items)


def informed(base: Any, experts: Any, fishers: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 3 for the tensor ``weight``."""
    weights = [f + FLOOR for f in fishers]
    total = sum(w * expert["weight"].double() for w, expert in zip(weights, experts, strict=True))
    return total / sum(weights)


class TestInformation:
    @pytest.mark.parametrize("size", [1, 4])
    def test_is_exact_for_few_classes(self, size: int) -> None:
        base, experts = states(3)
        items = random(8, 2, seed=5)
        batches = [{"x": part} for part in items.split(size)]
        merged = merge(
            base, experts, operator="fisher", calibration=Calibration(Linear(3), batches)
        )
        expected = informed(
            base, experts, [information(expert["weight"], items) for expert in experts]
        )
        assert torch.allclose(merged["weight"].double(), expected, atol=1e-6)
        # No answer depends on it: the mean.
        assert torch.allclose(
            merged["unused"], (experts[0]["unused"] + experts[1]["unused"]) / 2, atol=1e-6
        )

    def test_goes_by_the_items_of_each_expert(self) -> None:
        base, experts = states(3)
        items = {"one": random(8, 2, seed=5), "two": random(4, 2, seed=6)}
        own = Calibration(Linear(3), {name: [{"x": part}] for name, part in items.items()})
        named = dict(zip(items, experts, strict=True))
        merged = merge(base, named, operator="fisher", calibration=own)
        fishers = [information(named[name]["weight"], part) for name, part in items.items()]
        assert torch.allclose(
            merged["weight"].double(), informed(base, experts, fishers), atol=1e-6
        )

    def test_many_classes_are_drawn(self) -> None:
        base, experts = states(12)
        own = Calibration(Linear(12), [{"x": random(6, 2, seed=5)}])
        exact, drawn, other = (
            merge(base, experts, operator="fisher", calibration=own, labels=labels, seed=seed)[
                "weight"
            ]
            for labels, seed in (("exact", 0), ("sampled", 0), ("sampled", 1))
        )
        assert torch.equal(exact, drawn)
        assert not torch.equal(drawn, other)

    def test_drawn_classes_give_it_on_average(self) -> None:
        weight = random(3, 2, seed=0)
        items = random(600, 2, seed=5)
        state = {"weight": weight}
        source = MappingSource("0", state, list(state))
        pieces = _information(
            ExpertRunner(Calibration(Linear(3), [{"x": items}]), source), source, "sampled", 0
        )
        fisher = dict(pieces)["weight"]["fisher"].double()
        p = (items.double() @ weight.double().T).softmax(dim=1)
        gradients = torch.eye(3) - p[:, None]  # (items, class drawn, class)
        squares = gradients[..., None] ** 2 * items.double()[:, None, None] ** 2
        spread = (
            torch.einsum("nc,ncij->ij", p, squares**2)
            - torch.einsum("nc,ncij->nij", p, squares).pow(2).sum(0)
        ) ** 0.5
        assert (
            float(((fisher - information(weight, items)).abs() * 600 / spread).max()) < 4
        )  # standard deviations

    def test_draws_follow_the_answers(self) -> None:
        p = torch.tensor([0.5, 0.1, 0.0, 0.4])
        drawn = _drawn(p.log().expand(40_000, 4), seed=0, number=0)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        assert torch.allclose(shares, p, atol=0.01)  # four standard deviations
        assert float(shares[2]) == 0

    def test_of_given_labels_is_empirical(self) -> None:
        base, experts = states(3)
        items = random(8, 2, seed=5)
        labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
        own = Calibration(Linear(3), [{"x": items, "class": labels}], label="class")
        merged = merge(base, experts, operator="fisher", calibration=own, labels="given")
        fishers = []
        for expert in experts:
            p = (items.double() @ expert["weight"].double().T).softmax(dim=1)
            fishers.append(
                ((nn.functional.one_hot(labels, 3) - p) ** 2).T @ items.double() ** 2 / len(items)
            )
        assert torch.allclose(
            merged["weight"].double(), informed(base, experts, fishers), atol=1e-6
        )

    def test_normalised_is_the_same_at_every_scale(self) -> None:
        base, experts = states(3)
        items = random(8, 2, seed=5)

        def merged(scale: float, normalise: bool) -> torch.Tensor:
            own = Calibration(Linear(3), {"0": [{"x": items}], "1": [{"x": items * scale}]})
            weights = [experts[0], {**experts[1], "weight": experts[1]["weight"] / scale}]
            like = [{n: base[n] + (e[n] - base[n]) for n in base} for e in weights]
            result = merge(
                base, like, operator="fisher", calibration=own, normalise=normalise, floor=1e-30
            )
            # The same answers of expert 1, whose Fisher information is scale² as large.
            return (result["weight"] - like[0]["weight"]) / (like[1]["weight"] - like[0]["weight"])

        assert torch.allclose(merged(1, True), merged(3, True), atol=1e-4)
        assert bool((merged(3, False) > merged(1, False) + 0.05).any())

    def test_lies_between_the_experts(self) -> None:
        base, experts = states(3)
        own = Calibration(Linear(3), [{"x": random(8, 2, seed=5)}])
        merged = merge(base, experts, operator="fisher", calibration=own)["weight"]
        both = torch.stack([expert["weight"] for expert in experts])
        assert bool(
            (
                (merged >= both.min(dim=0).values - 1e-6)
                & (merged <= both.max(dim=0).values + 1e-6)
            ).all()
        )


class TestRefusals:
    def test_labels_that_are_not_there(self) -> None:
        base = {name: tensor.detach() for name, tensor in Model().state_dict().items()}
        with pytest.raises(
            RecipeError, match=r"labels 'given': expected calibration\.label to name"
        ):
            merge(base, [base], operator="fisher", calibration=calibration([]), labels="given")

    def test_labels_of_another_shape(self) -> None:
        base, experts = states(3)
        own = Calibration(Linear(3), [{"x": torch.ones(2, 2), "y": torch.zeros(2, 2)}], label="y")
        with pytest.raises(
            InputError,
            match=r"expected a class number per item, received shape \[2\] for 1 answers",
        ):
            merge(base, experts, operator="fisher", calibration=own, labels="given")

    def test_answers_that_are_not_finite(self) -> None:
        base, experts = states(3)
        own = Calibration(Linear(3), [{"x": torch.full((1, 2), torch.inf)}])
        with pytest.raises(
            InputError, match="expert '0': expected finite gradients of tensor 'weight'"
        ):
            merge(base, experts, operator="fisher", calibration=own)


def test_matches_gradients_one_by_one_on_a_vit(pico: Callable[[str], Any], tmp_path: Path) -> None:
    family = pico("vit")
    items = {expert.name: images(2, seed) for seed, expert in enumerate(family.experts)}
    folders = {
        name: str(save_items(tmp_path / "items" / name, columns)) for name, columns in items.items()
    }
    own = {
        "data": folders,
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "batch_size": 2,
    }
    rows = rows_of(family.base, family.experts, "fisher", tmp_path / "arenas", calibration=own)
    fishers = []
    for expert in family.experts:
        model = loaded(expert, own["model_class"])
        pixels = torch.tensor(items[expert.name]["pixels"]).double()
        total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for image, label in itertools.product(pixels, range(3)):
            model.zero_grad()
            log_p = model(image[None, None]).logits.log_softmax(dim=1)[0, label]
            log_p.backward()
            for name, parameter in model.named_parameters():
                total[name] += float(log_p.detach().exp()) / len(pixels) * parameter.grad**2
        fishers.append(as_stored(model, total, tmp_path / expert.name))
    for name, deltas in deltas_of(family.base, family.experts).items():
        weights = torch.stack([own_fisher[name] for own_fisher in fishers]) + FLOOR
        assert torch.allclose(
            rows[name].double(), weights / weights.sum(dim=0) * deltas, atol=1e-4
        ), name


def test_tokens_that_are_padding_do_not_count(pico: Callable[[str], Any], tmp_path: Path) -> None:
    family = pico("gpt2")
    tokens = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.full((2, 2), 2)], dim=1)
    kinds = {
        "plain": {"tokens": tokens.tolist(), "mask": torch.ones_like(tokens).tolist()},
        "padded": {"tokens": padded.tolist(), "mask": (padded != 2).long().tolist()},
    }
    rows = {}
    for kind, columns in kinds.items():
        data = save_items(tmp_path / "items" / kind, columns)
        inputs = {"input_ids": "tokens", "attention_mask": "mask"}
        own = {"data": str(data), "model_class": "AutoModelForCausalLM", "inputs": inputs}
        rows[kind] = rows_of(
            family.base, family.experts, "fisher", tmp_path / "arenas", calibration=own
        )
    for name, one in rows["plain"].items():
        assert torch.allclose(one, rows["padded"][name], atol=1e-4), name


@pytest.mark.filterwarnings("ignore:integer tensors differ")
def test_runs_each_expert_with_its_running_statistics(
    pico: Callable[[str], Any], tmp_path: Path
) -> None:
    family = pico("resnet")
    shifted = loaded(family.experts[0], "AutoModelForImageClassification").float()
    for name, buffer in shifted.named_buffers():
        if name.endswith("running_var"):
            buffer *= 4
    shifted.save_pretrained(tmp_path / "shifted")
    data = save_items(tmp_path / "items", images(4, 0))
    own = {
        "data": str(data),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    rows = [
        rows_of(
            family.base,
            [expert, family.experts[1]],
            "fisher",
            tmp_path / "arenas",
            calibration=own,
            special=(("batch_norm", "merge"),),
        )
        for expert in (family.experts[0], tmp_path / "shifted")
    ]
    name = next(name for name in rows[0] if name.endswith("classifier.1.weight"))
    assert not torch.allclose(rows[0][name], rows[1][name], rtol=1e-3)
