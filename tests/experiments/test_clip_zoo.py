"""The CLIP zoo: deterministic, reused, one text tower, and scored alike by the evaluator."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.zoo import clip
from experiments.zoo.clip_data import CLASSES, NOISE, SIDE, draw, make_items
from experiments.zoo.digits import Training
from mergesearch.evaluators import Candidate
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.models.prompt_heads import reads_text
from tests.evaluators.items import opened, recipe_at

#: The zoo of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("clip zoo")

BRIEF = Training(steps=2, rate=1e-3, batch=8)
TINY = clip.Settings(
    base=BRIEF, expert=BRIEF, items={"search": 6, "validation": 5, "test": 20, "training": 30}
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip.build_clip(tmp_path_factory.mktemp("zoo") / "clip", TINY)


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.mark.slow
def test_the_same_settings_give_the_same_zoo(zoo: Path, tmp_path: Path) -> None:
    again = clip.build_clip(tmp_path / "clip", TINY)
    assert weights(again) == weights(zoo)
    assert len(set(weights(zoo).values())) == 1 + len(CLASSES)
    before = (zoo / "manifest.json").stat().st_mtime_ns
    clip.build_clip(zoo, TINY)
    assert (zoo / "manifest.json").stat().st_mtime_ns == before


def test_experts_keep_the_text_tower(zoo: Path) -> None:
    base = open_checkpoint(str(zoo / "base"))
    for task in CLASSES:
        expert = open_checkpoint(str(zoo / task))
        for name in base.tensors:
            same = bool((base.read(name) == expert.read(name)).all())
            assert same or not (reads_text(name) or "logit_scale" in name)


def test_the_evaluator_finds_the_accuracy_of_the_manifest(zoo: Path) -> None:
    manifest = json.loads((zoo / "manifest.json").read_text())
    objectives = [{"name": task, "metric": "accuracy", "domains": [task]} for task in CLASSES]
    section = clip.section(zoo, tokenizer=str(zoo / "base"), objectives=objectives)
    evaluator = opened(section)
    for name in ("base", "digits"):
        model = load_model(str(zoo / name), "AutoModelForZeroShotImageClassification")
        measured = evaluator.evaluate(Candidate(recipe_at([0.0]), model), "test")
        assert measured.values == pytest.approx(manifest["accuracy"][name])


@pytest.mark.parametrize("task", ["shapes", "stripes", "counts"])
def test_drawn_images(task: str) -> None:
    images, labels = draw(task, 60, [0])
    assert images.shape == (60, 3, SIDE, SIDE)
    assert set(labels.tolist()) == set(range(len(CLASSES[task])))
    assert abs(images).max() <= 1
    again, _ = draw(task, 60, [0])
    np.testing.assert_array_equal(images, again)
    if task == "counts":
        # A dot covers four pixels, which are at least 0.7 brighter than the ground.
        ground = np.median(images, axis=(2, 3), keepdims=True)
        bright = (images - ground).mean(axis=1) > 0.7 - 2 * NOISE
        np.testing.assert_allclose(bright.sum(axis=(1, 2)), 4 * (labels + 1), atol=4)


def test_items_of_the_splits_differ() -> None:
    items = make_items({"search": 5, "test": 5}, 0)
    for task in CLASSES:
        assert not np.array_equal(items["search"][task][0], items["test"][task][0])
