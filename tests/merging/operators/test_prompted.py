"""Operators that run the experts, on a CLIP that answers by class prompts: one test for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import InputError, RecipeError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.models.calibration_experts import check_experts, check_model
from mergesearch.merging.models.calibration_spec import Calibration, absolute
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.models.prompt_heads import PromptHeads, reads_text
from mergesearch.merging.operators import get_operator
from tests.evaluators.prompted import (
    CLASSES,
    image_folder,
    image_splits,
    pico_clip,
    word_tokenizer,
)

PROMPT = "a photo of a {}"
LAYER = "vision_model.encoder.layers.0.mlp.fc1.weight"
TEXT_LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts of its vision tower, two of both towers (``both-*``), and images."""
    folder = image_folder(tmp_path_factory.mktemp("prompted"))
    for seed, name in enumerate(("base", *CLASSES, *(f"both-{task}" for task in CLASSES))):
        model = pico_clip()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                moved = "both" in name or not (reads_text(key) or key == "logit_scale")
                if seed and moved:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
    word_tokenizer(folder / "base")
    return folder


def calibration(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": str(folder / "images"),
        "split": "search",
        "domain": "domain",
        "model_class": "AutoModelForZeroShotImageClassification",
        "inputs": {"pixel_values": "image"},
        "batch_size": 4,
        "prompts": [PROMPT],
        "classes": CLASSES,
    } | changes


def rows(
    folder: Path, operator: str, *experts: str, given: Any = None, **options: Any
) -> dict[str, list[torch.Tensor]]:
    """Tensor -> the rows that an operator prepares; experts are named after the tasks."""
    base = open_checkpoint(str(folder / "base"), "base")
    names = experts or tuple(CLASSES)
    tuned = [
        open_checkpoint(str(folder / path), task)
        for path, task in zip(names, CLASSES, strict=False)
    ]
    chosen = get_operator(operator)
    options = {"calibration": calibration(folder) if given is None else given, **options}
    complete = chosen.check(layout_of(base), len(tuned), options)
    basis = chosen.prepare(base, tuned, **complete)
    return {name: basis.rows(name) for name in base.names}


def pixels_of(task: str) -> torch.Tensor:
    """The search images of a task."""
    table = image_splits()["search"]
    chosen = [index for index, domain in enumerate(table["domain"]) if domain == task]
    return torch.tensor(table["image"])[chosen]


def log_p(model: Any, folder: Path, task: str, image: torch.Tensor) -> torch.Tensor:
    """Logarithms of the classes' probabilities by the model's own comparison."""
    texts = word_tokenizer(folder / "words")(
        [PROMPT.format(name) for name in CLASSES[task]], return_tensors="pt"
    )
    logits = model(
        pixel_values=image[None],
        input_ids=texts["input_ids"],
        attention_mask=texts["attention_mask"],
    ).logits_per_image[0]
    found: torch.Tensor = logits.log_softmax(0)
    return found


def information(folder: Path, name: str, task: str, tensor: str) -> torch.Tensor:
    """Fisher information of one tensor, gradient by gradient."""
    model = type(pico_clip()).from_pretrained(folder / name)
    parameter = model.get_parameter(tensor)
    images = pixels_of(task)
    total = torch.zeros_like(parameter)
    for image in images:
        one = log_p(model, folder, task, image)
        for log in one:
            (gradient,) = torch.autograd.grad(log, [parameter], retain_graph=True)
            total += log.detach().exp() * gradient**2
    return total / len(images)


@pytest.mark.parametrize(
    ("experts", "tensor"),
    [(("colours", "shapes"), LAYER), (("both-colours", "both-shapes"), TEXT_LAYER)],
)
def test_fisher_is_that_of_the_models_own_comparison(
    folder: Path, experts: tuple[str, str], tensor: str
) -> None:
    got = rows(folder, "fisher", *experts, floor=1e-9)[tensor]
    fishers = [
        information(folder, name, task, tensor) + 1e-9
        for name, task in zip(experts, CLASSES, strict=True)
    ]
    base = open_checkpoint(str(folder / "base")).read(tensor)
    for name, fisher, row in zip(experts, fishers, got, strict=True):
        delta = open_checkpoint(str(folder / name)).read(tensor) - base
        torch.testing.assert_close(row, delta * fisher / sum(fishers), rtol=1e-3, atol=1e-6)


def gram(folder: Path, name: str, task: str, tensor: str) -> torch.Tensor:
    """Mean of x xᵀ over the inputs of a layer, from images of a task and each text by itself."""
    model = type(pico_clip()).from_pretrained(folder / name).double()
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(tensor.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    tokenizer = word_tokenizer(folder / "words")
    with torch.no_grad():
        model.get_image_features(pixel_values=pixels_of(task).double())
        for class_name in CLASSES[task]:
            for prompt in PROMPTS:
                model.get_text_features(**tokenizer(prompt.format(class_name), return_tensors="pt"))
    vectors = torch.cat(seen)
    return vectors.T @ vectors / len(vectors)


#: Of different lengths, so that padding would show.
PROMPTS = [PROMPT, "the {}"]


@pytest.mark.parametrize(
    ("experts", "tensor"),
    [(("colours", "shapes"), LAYER), (("both-colours", "both-shapes"), TEXT_LAYER)],
)
def test_regmean_sees_images_and_texts_without_padding(
    folder: Path, experts: tuple[str, str], tensor: str
) -> None:
    given = calibration(folder, prompts=PROMPTS)
    got = rows(folder, "regmean", *experts, given=given, reduce=1.0)
    base = open_checkpoint(str(folder / "base")).read(tensor)
    grams = [gram(folder, name, task, tensor) for name, task in zip(experts, CLASSES, strict=True)]
    for name, own, row in zip(experts, grams, got[tensor], strict=True):
        delta = (open_checkpoint(str(folder / name)).read(tensor) - base).double()
        expected = delta @ own @ torch.linalg.inv(sum(grams))
        torch.testing.assert_close(row.double(), expected, rtol=1e-2, atol=1e-3)
    if tensor == LAYER:
        assert all(float(row.abs().max()) == 0 for row in got[TEXT_LAYER])
        assert torch.equal(rows(folder, "regmean_pp")[TEXT_LAYER][0], got[TEXT_LAYER][0])


def test_concrete_learns_to_be_sure_of_class_prompts(folder: Path) -> None:
    model = pico_clip()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def entropy(prepared: dict[str, list[torch.Tensor]]) -> float:
        merged = {name: base[name] + 0.3 * sum(own) for name, own in prepared.items()}
        model.load_state_dict(base | merged)
        total = 0.0
        with torch.no_grad():
            for task in CLASSES:
                logs = [log_p(model, folder, task, image) for image in pixels_of(task)]
                total += sum(-float((log.exp() * log).sum()) for log in logs)
        return total

    unlearned, learned = (
        rows(folder, "concrete", steps=steps, learning_rate=0.3) for steps in (0, 15)
    )
    assert entropy(learned) < entropy(unlearned) - 0.05


def test_heads_in_memory_are_the_callers(folder: Path) -> None:
    heads = PromptHeads({"": [PROMPT]}, CLASSES, word_tokenizer(folder / "words"))
    model = pico_clip()
    batches = {task: [{"pixel_values": pixels_of(task)}] for task in CLASSES}
    given = Calibration(model, batches, head=heads.fixed_by(model))
    got = rows(folder, "fisher", given=given)[LAYER]
    for one, other in zip(got, rows(folder, "fisher")[LAYER], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_keys_of_results_know_prompts_and_texts(folder: Path) -> None:
    def key(*experts: str, **changes: Any) -> Any:
        sources = [open_checkpoint(str(folder / name)) for name in experts]
        complete = get_operator("fisher").complete({"calibration": calibration(folder, **changes)})
        base = open_checkpoint(str(folder / "base"))
        return ExpertRunner(complete["calibration"], base, sources).key(["x"], ["colours"])

    first = key("colours", "shapes")
    assert first == key("shapes")
    assert first != key("both-shapes")
    assert first != key("shapes", prompts=PROMPTS)


def test_images_of_an_expert_are_those_of_its_domain(folder: Path) -> None:
    complete = get_operator("fisher").complete({"calibration": calibration(folder)})
    runner = ExpertRunner(complete["calibration"], open_checkpoint(str(folder / "base")))
    items = runner.items("shapes")
    got = torch.cat([one.inputs["pixel_values"] for one in items])
    assert {one.task for one in items} == {"shapes"}
    assert np.allclose(got.sum(0), pixels_of("shapes").sum(0), atol=1e-5)
    with pytest.raises(
        InputError, match=r"items of domain 'cars', the name of an expert, received"
    ):
        runner.items("cars")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"domain 'cars', the name of an expert, received only those of colours, shapes;"),
        ({"prompts": {"colours": [PROMPT]}}, "prompts: expected an entry for every.*for 'cars'"),
        ({"data": {"colours": "images"}}, "data: expected an entry for every.*for 'cars'"),
    ],
)
def test_experts_without_items_are_known_beforehand(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    given = calibration(folder, **({"classes": ["red"]} | changes))
    with pytest.raises(InputError, match=message):
        check_experts({"calibration": given}, ["colours", "cars"])
    check_experts({"calibration": calibration(folder)}, list(CLASSES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"pixels": "image"}}, "inputs: .*CLIPModel, received 'pixels'; did you mean"),
        ({"model_class": "AutoModelForCTC"}, "model_class: expected a class that loads the base"),
        ({"model_class": "AutoModelForAll"}, "model_class: .*transformers auto class"),
        ({"tokenizer": "images"}, "tokenizer: .*expected a tokenizer"),
    ],
)
def test_models_that_cannot_be_run_are_known_beforehand(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    base = open_checkpoint(str(folder / "base"))
    check_model({"calibration": calibration(folder)}, base)
    if "tokenizer" in changes:
        changes = {"tokenizer": str(folder / changes["tokenizer"])}
    with pytest.raises(InputError, match=f"calibration.{message}") as caught:
        check_model({"calibration": calibration(folder, **changes)}, base)
    assert "\n" not in str(caught.value)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": ["a photo"]}, r"calibration\.prompts: expected {} once, where the name"),
            ({"prompts": {"colours": [PROMPT]}}, "expected prompts for every domain.*'shapes'"),
            ({"prompts": []}, r"'calibration\.prompts': Value should have at least 1 item"),
            (
                {"prompts": {"colours": []}},
                "expected some for every expert, received none for 'colours'",
            ),
            ({"domain": "kind"}, "expected a column 'kind'"),
            (
                {"classes": {"colours": ["red"]}, "data": "both"},
                r"calibration\.classes: expected names of the classes of every expert.*'shapes'",
            ),
        ],
    )
    def test_before_weights_are_read(
        self, folder: Path, changes: dict[str, Any], message: str
    ) -> None:
        if changes.get("data") == "both":
            changes = changes | {"data": dict.fromkeys(CLASSES, str(folder / "images"))}
        with pytest.raises(RecipeError, match=message) as caught:
            rows(folder, "fisher", given=calibration(folder, **changes))
        assert "\n" not in str(caught.value)

    def test_without_prompts_or_names(self, folder: Path) -> None:
        given = calibration(folder)
        del given["classes"]
        with pytest.raises(RecipeError, match="expected names of the classes, found none in"):
            rows(folder, "fisher", given=given)
        del given["prompts"]
        with pytest.raises(RecipeError, match=r"calibration\.prompts: required key is missing"):
            rows(folder, "fisher", given=given)
        with pytest.raises(RecipeError, match=r"calibration\.tokenizer: expected none without"):
            rows(folder, "fisher", given=given | {"tokenizer": "words"})

    def test_models_that_compare_nothing(self, folder: Path, pico: Any) -> None:
        given = calibration(folder, model_class="AutoModelForImageClassification")
        complete = get_operator("fisher").complete({"calibration": given})
        runner = ExpertRunner(complete["calibration"], open_checkpoint(str(pico("vit").base)))
        with pytest.raises(InputError, match="expected a model of images and texts such as CLIP"):
            _ = runner.model


def test_tokenizers_start_at_the_folder_of_the_file(folder: Path) -> None:
    given = {"calibration": calibration(folder, tokenizer="words")}
    assert absolute(given, folder)["calibration"]["tokenizer"] == str(folder / "words")
