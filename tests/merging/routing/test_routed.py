"""Input-dependent merges against independent computations of every part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging import CheckpointError, Field, InputError, Recipe, RecipeError, Source
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.models.prompt_heads import PromptHeads
from mergesearch.merging.routing.bundle import load
from mergesearch.merging.routing.divergence import js_divergence
from mergesearch.merging.routing.router import train_router
from mergesearch.merging.routing.t3 import T3
from mergesearch.merging.routing.twin_merging import TwinMerging
from mergesearch.merging.routing.vectors import (
    copied_tensors,
    exclusive_vector,
    floating_tensors,
    low_rank,
)
from tests.evaluators.items import pico_vit
from tests.evaluators.prompted import CLASSES, pico_clip, word_tokenizer

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def t3(**options: object) -> T3:
    values = {"low": 0.1, "high": 0.8, "gamma": 3.0} | options
    return T3(pico_vit(0), copied_tensors(pico_vit(0)), copied_tensors(pico_vit(1)), **values)


def twin(rank: float = 1.0, **options: object) -> TwinMerging:
    models = [copied_tensors(pico_vit(seed)) for seed in (0, 1, 2)]
    vectors = [exclusive_vector(expert, models[0], rank) for expert in models[1:]]
    points = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    router = train_router(points, torch.arange(12) % 2, 2, width=8, steps=20, seed=0)
    return TwinMerging(pico_vit(0), models[0], vectors, router, **{"temperature": 1.0, **options})


def test_divergence_is_the_textbook_formula() -> None:
    logits = (
        torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.5, -0.4], [0.0, 0.0, 0.0]]),
    )
    p, q = (
        np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(1, keepdims=True)
        for x in logits
    )
    mean = (p + q) / 2
    expected = ((p * np.log(p / mean)).sum(1) + (q * np.log(q / mean)).sum(1)) / 2
    np.testing.assert_allclose(js_divergence(*logits).numpy(), expected, atol=1e-15)


def test_divergence_lies_between_zero_and_log_two() -> None:
    apart = js_divergence(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]))
    assert float(apart) == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize(("centred", "expected"), [(False, 0.45), (True, 0.1)])
def test_interpolation_of_models_that_agree(centred: bool, expected: float) -> None:
    base = copied_tensors(pico_vit(0))
    routed = T3(pico_vit(0), base, base, low=0.1, high=0.8, gamma=3.0, centred=centred)
    assert routed(IMAGES).weights.flatten().tolist() == pytest.approx(
        [expected] * len(IMAGES), abs=1e-12
    )


def test_each_item_is_merged_alone_bit_for_bit() -> None:
    answer = t3()(IMAGES)
    assert len(answer.weights.unique()) == len(IMAGES)
    base, expert = (copied_tensors(pico_vit(seed)) for seed in (0, 1))
    for index, (weight,) in enumerate(answer.weights.tolist()):
        model = pico_vit(5)
        for name, target in floating_tensors(model).items():
            target.copy_(torch.lerp(base[name], expert[name], weight))
        with torch.no_grad():
            alone = model(IMAGES[index : index + 1]).logits[0]
        assert torch.equal(answer.logits[index], alone)


def test_a_batch_is_merged_by_its_mean_divergence() -> None:
    with torch.no_grad():
        apart = js_divergence(pico_vit(0)(IMAGES).logits, pico_vit(1)(IMAGES).logits).mean()
    expected = 0.1 + 0.7 / (1 + math.exp(-3 * float(apart)))
    weights = t3(per="batch")(IMAGES).weights
    assert weights.flatten().tolist() == pytest.approx([expected] * len(IMAGES), abs=1e-6)


class TestPrompts:
    """A CLIP whose towers both differ, and images of two tasks with three and two classes."""

    PIXELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    TASKS = ("colours", "shapes", "shapes", "colours")

    def t3(self, folder: Path, **options: object) -> T3:
        heads = PromptHeads({"": ["a photo of a {}"]}, CLASSES, word_tokenizer(folder))
        sources = [copied_tensors(pico_clip(seed)) for seed in (0, 1)]
        values = {"low": 0.1, "high": 0.8, "gamma": 3.0, "head": heads} | options
        return T3(pico_clip(0), *sources, **values)

    def logits(self, model: object, folder: Path, index: int) -> torch.Tensor:
        """Of one image among the classes of its task, by the model's own comparison."""
        names = CLASSES[self.TASKS[index]]
        texts = word_tokenizer(folder)([f"a photo of a {n}" for n in names], return_tensors="pt")
        pixels = self.PIXELS[index : index + 1]
        with torch.no_grad():
            output = model(  # type: ignore[operator]
                pixel_values=pixels,
                input_ids=texts["input_ids"],
                attention_mask=texts["attention_mask"],
            )
        answer: torch.Tensor = output.logits_per_image[0]
        return answer

    def test_each_image_is_merged_by_the_classes_of_its_task(self, tmp_path: Path) -> None:
        answer = self.t3(tmp_path)(self.PIXELS, tasks=self.TASKS)
        base, expert = pico_clip(0), pico_clip(1)
        for index, task in enumerate(self.TASKS):
            pair = (self.logits(model, tmp_path, index)[None] for model in (base, expert))
            apart = float(js_divergence(*pair))
            weight = 0.1 + 0.7 / (1 + math.exp(-3 * apart))
            assert float(answer.weights[index]) == pytest.approx(weight, abs=1e-5)
            merged = pico_clip(0)
            sources = [copied_tensors(model) for model in (base, expert)]
            for name, target in floating_tensors(merged).items():
                target.copy_(torch.lerp(*(tensors[name] for tensors in sources), weight))
            count = len(CLASSES[task])
            expected = self.logits(merged, tmp_path, index)
            torch.testing.assert_close(answer.logits[index, :count], expected, rtol=1e-3, atol=1e-3)
            assert bool(answer.logits[index, count:].isneginf().all())

    def test_one_task_has_its_own_classes_alone(self, tmp_path: Path) -> None:
        routed = self.t3(tmp_path, per="batch")
        assert routed(self.PIXELS, tasks="shapes").logits.shape == (4, 2)
        with pytest.raises(InputError, match="tasks: expected one of colours, shapes"):
            routed(self.PIXELS)
        with pytest.raises(InputError, match="expected one of the tasks colours, shapes, received"):
            routed(self.PIXELS, tasks="cars")


def test_low_rank_is_the_best_of_its_rank() -> None:
    tensor = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(tensor.reshape(6, 8))
    error = (low_rank(tensor, 0.5).dense() - tensor).square().sum()
    assert float(error) == pytest.approx(float(values[3:].square().sum()), rel=1e-4)
    torch.testing.assert_close(low_rank(tensor, 1.0).dense(), tensor, atol=1e-5, rtol=0)
    assert torch.equal(low_rank(tensor[:, 0, 0, 0], 0.01).dense(), tensor[:, 0, 0, 0])


@pytest.mark.parametrize("expert", [0, 1])
def test_full_rank_and_one_weight_reproduce_the_expert(expert: int) -> None:
    routed = twin()
    routed.write([float(expert == k) for k in range(2)])
    for name, tensor in floating_tensors(pico_vit(expert + 1)).items():
        torch.testing.assert_close(floating_tensors(routed.model)[name], tensor, atol=1e-5, rtol=0)


def test_a_cold_router_chooses_one_expert() -> None:
    warm = twin()(IMAGES).weights
    cold = twin(temperature=1e-6)(IMAGES).weights
    assert torch.equal(cold.argmax(dim=1), warm.argmax(dim=1))
    assert cold.max(dim=1).values.tolist() == pytest.approx([1.0] * len(IMAGES))


def test_router_learns_and_repeats_itself_without_global_generators() -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(40) % 2
    points = torch.randn(40, 5, generator=generator) + 3 * labels[:, None]
    before = torch.get_rng_state()
    routers = [train_router(points, labels, 2, width=8, steps=60, seed=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(routers[0](points), routers[1](points))
    assert float((routers[0](points).argmax(1) == labels).float().mean()) > 0.9


def recipe(**options: object) -> Recipe:
    return Recipe(
        Source("base", "b"),
        (Source("e", "e"),),
        "task_arithmetic",
        Field.constant(4, [0.5]),
        **options,
    )


def test_recipes_of_checkpoints_keep_their_identity() -> None:
    assert recipe().digest == "a28564c7f3d3a8c3"
    assert "routing" not in recipe().to_dict()


def test_routing_is_part_of_a_recipe() -> None:
    routed = recipe(routing=(("gamma", 0.5), ("method", "t3")))
    assert routed.digest not in (
        recipe().digest,
        recipe(routing=(("gamma", 0.6), ("method", "t3"))).digest,
    )
    assert routed.basis_key == recipe().basis_key
    assert Recipe.from_dict(routed.to_dict()) == routed


def test_no_checkpoint_is_exported_of_an_input_dependent_merge(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'t3', which is merged for each input"):
        export_model(recipe(routing=(("method", "t3"),)), tmp_path / "out")


def test_other_folders_are_no_bundles(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder with routing\.json"):
        load(tmp_path)
    (tmp_path / "routing.json").write_text(
        '{"format": 9, "routing": {"method": "t3"}, "experts": [], "model_class": ""}'
    )
    with pytest.raises(CheckpointError, match="received 9"):
        load(tmp_path)


def test_a_cast_model_is_still_the_one_that_is_merged() -> None:
    routed = t3().double()
    answer = routed(IMAGES.double())
    assert answer.logits.dtype == torch.float64
    torch.testing.assert_close(answer.logits.float(), t3()(IMAGES).logits, atol=1e-4, rtol=1e-4)
