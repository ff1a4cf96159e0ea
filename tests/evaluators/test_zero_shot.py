"""Zero-shot classification agrees with transformers' own logits, and has gradients of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Batch, Candidate, Evaluator
from mergesearch.merging import InputError, Source
from mergesearch.merging.models.prompt_heads import reads_text
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.prompted import (
    CLASSES,
    image_folder,
    image_splits,
    pico_clip,
    word_tokenizer,
    zero_shot,
)

PROMPT = "a photo of a {}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request: pytest.FixtureRequest) -> Any:
    return pico_clip(siglip=request.param == "siglip").double()


def plain_logits(model: Any, folder: Path, index: int, prompt: str = PROMPT) -> torch.Tensor:
    """Logits of one search item by the model's own comparison of images and texts."""
    table = image_splits()["search"]
    tokenizer = word_tokenizer(folder / "words")
    texts = [prompt.format(name) for name in CLASSES[table["domain"][index]]]
    full = model.config.model_type == "siglip"
    encoded = tokenizer(
        texts, padding="max_length" if full else True, max_length=8, return_tensors="pt"
    )
    wanted = {"input_ids": encoded["input_ids"]}
    if not full:
        wanted["attention_mask"] = encoded["attention_mask"]
    pixels = torch.tensor(table["image"][index]).double()[None]
    output: torch.Tensor = model(pixel_values=pixels, **wanted).logits_per_image[0]
    return output


def test_agrees_with_the_model_itself(folder: Path, model: Any) -> None:
    metrics = ("accuracy", "cross_entropy", "entropy")
    evaluator = opened(zero_shot(folder, *metrics, prompts=[PROMPT]))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    table = image_splits()["search"]
    for index, label in enumerate(table["label"]):
        with torch.no_grad():
            log_p = plain_logits(model, folder, index).log_softmax(0)
        assert measured.items["accuracy"][index] == float(int(log_p.argmax()) == label)
        assert measured.items["cross_entropy"][index] == pytest.approx(-float(log_p[label]))
        assert measured.items["entropy"][index] == pytest.approx(-float(log_p.exp() @ log_p))
    assert 0 < measured.values["accuracy"] < 1


def test_several_prompts_are_averaged(folder: Path) -> None:
    model = pico_clip().double()
    evaluator = opened(zero_shot(folder, "cross_entropy", prompts=[PROMPT, "the {}"]))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search").items["cross_entropy"]
    table = image_splits()["search"]
    heads = {}
    for domain, names in CLASSES.items():
        rows = []
        for name in names:
            texts = word_tokenizer(folder / "words")(
                [PROMPT.format(name), f"the {name}"], padding=True, return_tensors="pt"
            )
            parts = model.get_text_features(
                input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
            ).pooler_output
            mean = (parts / parts.norm(dim=1, keepdim=True)).mean(dim=0)
            rows.append(mean / mean.norm())
        heads[domain] = torch.stack(rows)
    for index, (label, domain) in enumerate(zip(table["label"], table["domain"], strict=True)):
        image = model.get_image_features(
            pixel_values=torch.tensor(table["image"][index]).double()[None]
        ).pooler_output[0]
        logits = model.logit_scale.exp() * heads[domain] @ (image / image.norm())
        assert measured[index] == pytest.approx(-float(logits.log_softmax(0)[label].detach()))


@pytest.mark.parametrize("metric", ["cross_entropy", "entropy"])
def test_the_gradient_goes_through_images_and_texts(folder: Path, model: Any, metric: str) -> None:
    evaluator = opened(zero_shot(folder, "accuracy", metric, prompts=[PROMPT]))
    model.zero_grad()
    result = evaluator.backward(candidate_at([0.0], model), Batch(), {metric: 1.0})
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    table = image_splits()["search"]
    losses: dict[str, list[torch.Tensor]] = {}
    for index, (label, domain) in enumerate(zip(table["label"], table["domain"], strict=True)):
        log_p = plain_logits(model, folder, index).log_softmax(0)
        loss = -log_p[label] if metric == "cross_entropy" else -(log_p.exp() * log_p).sum()
        losses.setdefault(domain, []).append(loss)
    expected = torch.stack([torch.stack(part).mean() for part in losses.values()]).mean()
    expected.backward()
    assert result.loss == pytest.approx(expected.item())
    assert any(name.startswith("text_model") for name in got)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.endswith("bias"):
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-6, atol=1e-9)


def stored(folder: Path, name: str, *, text: float = 0.0) -> Source:
    """A checkpoint whose vision tower differs from the others, and its text tower if asked."""
    model = pico_clip()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("vision_model") and name != "base":
                parameter.add_(0.1)
            if key.startswith("text_model"):
                parameter.add_(text)
    model.save_pretrained(folder / name)
    return Source(name, str(folder / name))


def counted_texts(evaluator: Evaluator, candidate: Candidate, model: Any) -> int:
    """Texts that the text tower reads while a candidate is measured and followed."""
    seen = []
    hook = model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    evaluator.evaluate(candidate, "search")
    evaluator.backward(candidate, Batch(), {"entropy": 1.0})
    hook.remove()
    return sum(seen)


def test_text_features_are_kept_where_the_text_tower_is_not_merged(
    folder: Path, tmp_path: Path
) -> None:
    base, same, other = (
        stored(tmp_path, "base"),
        stored(tmp_path, "same"),
        stored(tmp_path, "other", text=0.1),
    )
    model = pico_clip()
    evaluator = opened(zero_shot(folder, "entropy"))
    texts = 2 * sum(map(len, CLASSES.values()))
    bare = candidate_at([0.0], model)
    frozen = replace(bare, recipe=replace(bare.recipe, base=base, experts=(same,)))
    assert counted_texts(evaluator, frozen, model) == texts
    assert counted_texts(evaluator, replace(frozen, scored={}), model) == 0
    merged = replace(bare, recipe=replace(bare.recipe, base=base, experts=(same, other)))
    # Measured once for this tower, and read anew where a graph must go through it.
    assert counted_texts(evaluator, merged, model) > texts
    measured = evaluator.evaluate(replace(merged, scored={}), "search").values["entropy"]
    with torch.no_grad():
        model.text_projection.weight.add_(0.5 * torch.eye(12, 16))
    assert evaluator.evaluate(replace(merged, scored={}), "search").values["entropy"] != measured


def test_folders_of_images_name_the_classes(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for task, names in CLASSES.items():
        for name in names:
            (tmp_path / task / name).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / task / name / f"{number}.png")
    base = pico_clip()
    base.save_pretrained(tmp_path / "base")
    settings = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_rescale": True,
        "do_center_crop": True, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "size": {"shortest_edge": 8}, "resample": 3,
        "crop_size": {"height": 8, "width": 8}, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    data = {
        "file": {task: str(tmp_path / task) for task in CLASSES},
        "processor": str(tmp_path / "base"),
    }
    section = zero_shot(folder, "accuracy", data=data, domain=None, id=None)
    evaluator = opened(section)
    assert [evaluator.size(split) for split in ("search", "validation", "test")] == [15, 5, 5]
    assert evaluator._classes(["colours"]) == {"colours": ["blue", "green", "red"]}  # type: ignore[attr-defined]
    measured = evaluator.evaluate(candidate_at([0.0], base), "search")
    assert measured.items["accuracy"].size == 15
    broken = tmp_path / "colours" / "red" / "0.png"
    broken.write_bytes(b"")
    with pytest.raises(InputError, match=r"red/0.png: expected a picture"):
        build(section).check()


class TestRefused:
    def refusal(self, section: dict[str, Any]) -> str:
        with pytest.raises(InputError) as caught:
            build(section).check()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_prompts(self, folder: Path) -> None:
        assert "expected {} once, where the name" in self.refusal(
            zero_shot(folder, prompts=["a photo"])
        )
        message = self.refusal(zero_shot(folder, prompts={"colours": [PROMPT]}))
        assert "expected prompts for every domain, received none for 'shapes'" in message

    def test_classes(self, folder: Path) -> None:
        message = self.refusal(zero_shot(folder, data=str(folder / "images")))
        assert "expected names of the classes, found only numbers; list them in data" in message
        data = {"file": str(folder / "images"), "classes": {"colours": ["a"], "shapes": ["b"]}}
        evaluator = opened(zero_shot(folder, data=data))
        with pytest.raises(InputError, match="expected class numbers 0 to 0"):
            evaluator.evaluate(candidate_at([0.0], pico_clip()), "search")

    def test_labels_of_test_items_are_not_followed(self, folder: Path) -> None:
        message = self.refusal(zero_shot(folder, "accuracy", transductive=True))
        assert "expected objectives without labels (entropy)" in message
        evaluator = build(zero_shot(folder, "entropy", transductive=True))
        assert evaluator.transductive
        assert evaluator.proxies == ()
        assert evaluator.differentiable == ("entropy",)

    def test_tokenizer(self, folder: Path) -> None:
        assert "tokenizer: required key is missing" in self.refusal(
            zero_shot(folder, tokenizer=None)
        )


def test_names_of_towers() -> None:
    names = pico_clip().state_dict()
    texts = {name.split(".")[0] for name in names if reads_text(name)}
    assert texts == {"text_model", "text_projection"}
    siglip = pico_clip(siglip=True).state_dict()
    assert {name.split(".")[0] for name in siglip if reads_text(name)} == {"text_model"}
