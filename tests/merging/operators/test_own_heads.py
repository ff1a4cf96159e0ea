"""Operators that read answers, on experts that answer by heads of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import InputError, RecipeError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.family import ModelFamily, align_family
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import DEFAULTS
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators import OPERATORS, concrete
from mergesearch.merging.policies import TensorPolicies
from tests.merging.headed import headless, labelled, relabelled, without_prefix
from tests.merging.operators.calibrated import images, save_items
from tests.merging.operators.pico_runs import as_stored, loaded, rows_of

CLASS = "AutoModelForImageClassification"
COUNTS = (2, 5)
FLOOR = 1e-6
OWN = (("heads", "own"),)
Copy = Callable[..., Path]


@pytest.fixture
def folders(pico: Any, copy_of: Copy) -> list[Path]:
    """A base of three labels, and experts of two and five."""
    base, experts = pico("vit").base, pico("vit").experts
    heads = [
        relabelled(copy_of, path, [f"{count}-{k}" for k in range(count)], seed)
        for seed, (path, count) in enumerate(zip(experts, COUNTS, strict=True))
    ]
    return [base, *heads]


@pytest.fixture
def calibration(folders: list[Path], tmp_path: Path) -> dict[str, Any]:
    """Two images for each expert."""
    items = tmp_path / "items"
    data = {
        path.name: str(save_items(items / path.name, images(2, seed)))
        for seed, path in enumerate(folders[1:])
    }
    inputs = {"pixel_values": "pixels"}
    return {"data": data, "model_class": CLASS, "inputs": inputs, "batch_size": 2}


def family_of(folders: list[Path], **special: str) -> ModelFamily:
    opened = [open_checkpoint(str(path)) for path in folders]
    return align_family(opened[0], opened[1:], TensorPolicies(**({"heads": "own"} | special)))


def runner_of(folders: list[Path], calibration: dict[str, Any]) -> ExpertRunner:
    family = family_of(folders)
    spec: Any = {**DEFAULTS, **calibration}
    return ExpertRunner(spec, family.base, family.experts, own_heads=True)


def test_fisher_information_is_that_of_each_expert_s_answers(
    folders: list[Path], calibration: dict[str, Any], copy_of: Copy, tmp_path: Path
) -> None:
    base, *experts = folders
    rows = rows_of(
        base, experts, "fisher", tmp_path / "arenas", calibration=calibration, special=OWN
    )
    fishers = []
    for seed, (expert, count) in enumerate(zip(experts, COUNTS, strict=True)):
        model = loaded(expert, CLASS)
        pixels = torch.tensor(images(2, seed)["pixels"]).double()
        total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for image, label in itertools.product(pixels, range(count)):
            model.zero_grad()
            log_p = model(image[None, None]).logits.log_softmax(dim=1)[0, label]
            log_p.backward()
            for name, parameter in model.named_parameters():
                total[name] += float(log_p.detach().exp()) / len(pixels) * parameter.grad**2
        fishers.append(as_stored(model, total, tmp_path / f"fisher {count}"))
    assert not any("classifier" in name for name in rows)
    shared = {name: open_checkpoint(str(base)).read(name).double() for name in rows}
    for name, origin in shared.items():
        weights = torch.stack([own[name] for own in fishers]) + FLOOR
        deltas = torch.stack([open_checkpoint(str(e)).read(name).double() for e in experts])
        expected = weights / weights.sum(dim=0) * (deltas - origin)
        assert torch.allclose(rows[name].double(), expected, atol=1e-4), name
    other = without_prefix(copy_of, base, "vit.")  # and without a head
    again = rows_of(
        other, experts, "fisher", tmp_path / "again", calibration=calibration, special=OWN
    )
    assert len(again) == len(rows)
    for name, found in again.items():
        torch.testing.assert_close(found, rows[f"vit.{name}"])


def test_models_share_everything_but_their_heads(
    folders: list[Path], calibration: dict[str, Any]
) -> None:
    runner = runner_of(folders, calibration)
    names = [path.name for path in folders[1:]]
    logits = {name: runner.run(runner.items(name)[0]).logits for name in names}
    assert [one.shape[1] for one in logits.values()] == [*COUNTS]
    runner.model.zero_grad()
    parameter = "vit.layers.0.attention.q_proj.weight"
    sums = []
    for one in logits.values():
        one.square().sum().backward()
        sums.append(runner.model.get_parameter(parameter).grad.clone())
    assert not torch.equal(sums[0], sums[1])  # both are added up in one place
    head: Any = runner._model_and_head[1]
    for model in head.models.values():
        assert model.get_parameter(parameter) is runner.model.get_parameter(parameter)
    assert head.models[names[1]].get_parameter("classifier.weight").grad is None
    with pytest.raises(InputError, match="tasks: expected one of"):
        runner.run(Items(runner.items(names[0])[0].inputs, task="cars"))


def test_concrete_learns_from_the_answers_of_every_head(
    folders: list[Path], calibration: dict[str, Any], tmp_path: Path
) -> None:
    runner = runner_of(folders, calibration)
    items = runner.items(folders[2].name)[0]
    expected = loaded(folders[2], CLASS)(items.inputs["pixel_values"].double()).logits.detach()
    log_p = expected.log_softmax(dim=1)
    runner.load_all(family_of(folders).experts[1])
    entropy = concrete._entropy(runner, items).detach()
    assert float(entropy) == pytest.approx(
        float(-(log_p.exp() * log_p).sum(dim=1).mean()), rel=1e-4
    )
    rows = [
        rows_of(
            folders[0],
            folders[1:],
            "concrete",
            tmp_path / f"arenas {steps}",
            calibration=calibration,
            special=OWN,
            steps=steps,
        )
        for steps in (0, 2)
    ]
    for name, plain in rows[0].items():
        assert rows[1][name].shape == plain.shape
    assert any(not torch.allclose(rows[1][n], plain, rtol=1e-4) for n, plain in rows[0].items())


@pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")
def test_what_is_copied_from_the_base_is_so_in_every_model(
    pico: Any, copy_of: Copy, calibration: dict[str, Any]
) -> None:
    """Statistics of the base, not those that an expert was trained with."""
    resnet = pico("resnet")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {n: t + 1 if "running" in n else t for n, t in tensors.items()}
        return moved | {"classifier.1.weight": torch.ones(2, 8), "classifier.1.bias": torch.ones(2)}

    experts = [copy_of(path, change, **labelled(["no", "yes"])) for path in resnet.experts]
    family = family_of([resnet.base, *experts], batch_norm="base")
    spec: Any = {**DEFAULTS, **calibration}
    runner = ExpertRunner(spec, family.base, family.experts, own_heads=True)
    base = loaded(resnet.base, CLASS).state_dict()
    models: Any = runner._model_and_head[1]
    for model in models.models.values():
        kept = {n: t for n, t in model.state_dict().items() if "running" in n}
        assert kept
        assert all(torch.equal(tensor.double(), base[name]) for name, tensor in kept.items())


def test_an_expert_without_a_head_has_no_answers(folders: list[Path], copy_of: Copy) -> None:
    bare = [folders[0], folders[1], headless(copy_of, folders[2])]
    family = family_of(bare)
    for name in ("fisher", "concrete"):
        with pytest.raises(RecipeError) as caught:
            family.check(OPERATORS[name])
        assert f"operator {name}: expected a head in every expert" in str(caught.value)
        assert repr(bare[2].name) in str(caught.value)
        assert "\n" not in str(caught.value)
    family.check(OPERATORS["regmean"])
    family_of(folders).check(OPERATORS["fisher"])
