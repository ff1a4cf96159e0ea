"""The segments zoo: deterministic, reused, ordinary folders, tuned so that merging matters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.zoo import segments
from experiments.zoo.building import silence_transformers
from experiments.zoo.segments_data import DOMAINS, SIDE, draw_lesions, split_lesions
from mergesearch.evaluators import SPLITS, Candidate
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.preflight import check_family
from mergesearch.merging.models.loading import load_model
from tests.evaluators.items import opened, recipe_at

SIZES = {"search": 4, "validation": 3, "test": 5}
BRIEF = segments.Training(steps=2, rate=1e-3, batch=4)
#: The zoo of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("segments zoo")

TINY = segments.Settings(base=BRIEF, expert=BRIEF, drawn=10, images=SIZES)
IDLE = dataclasses.replace(TINY, base=segments.Training(0, 1e-3), expert=segments.Training(0, 1e-3))
MODELS = ("base", *segments.EXPERTS)


def prints(folder: Path) -> dict[str, str]:
    """File -> hash of its content, for what a merge starts from: weights, configurations, items."""
    files = sorted(
        path for path in folder.rglob("*") if path.suffix in {".safetensors", ".json", ".arrow"}
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        # The manifest holds seconds, the state of a `datasets` folder a fingerprint of the moment.
        if path.name not in {"manifest.json", "state.json"}
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segments.build_segments(tmp_path_factory.mktemp("zoo") / "segments", TINY, processes=1)


@pytest.fixture(scope="module")
def real_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_transformers()
    return segments.build_segments(tmp_path_factory.mktemp("real") / "segments")


class TestLesions:
    @pytest.mark.parametrize("domain", DOMAINS)
    def test_boxes_hold_their_lesions_and_no_more_than_they_must(self, domain: str) -> None:
        lesions = draw_lesions(domain, 50, (0, 1))
        assert lesions.pixels.shape == lesions.masks.shape == (50, SIDE, SIDE)
        assert np.isfinite(lesions.pixels).all()
        for (left, top, right, bottom), mask in zip(
            lesions.boxes[:, 0], lesions.masks, strict=True
        ):
            rows, columns = np.nonzero(mask)
            assert rows.size
            assert top <= rows.min()
            assert rows.max() <= bottom
            assert left <= columns.min()
            assert columns.max() <= right
            assert right - left - (columns.max() - columns.min()) <= 6

    def test_the_same_seed_gives_the_same_items_and_no_other_does(self) -> None:
        one, again, other = (draw_lesions("ct", 5, (0, split)).pixels for split in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert not np.isclose(one, other).all(axis=(1, 2)).any()

    def test_lesions_can_be_told_from_their_surroundings(self) -> None:
        signs = {"ct": 1, "mri": 1, "ultrasound": -1, "xray": -1}
        for domain, sign in signs.items():
            lesions = draw_lesions(domain, 200, (0, 1))
            inside = lesions.pixels[lesions.masks].mean()
            assert sign * (inside - lesions.pixels[~lesions.masks].mean()) > 0.15


class TestTinyZoo:
    def test_the_same_settings_give_the_same_bits(self, zoo: Path, tmp_path: Path) -> None:
        import torch

        torch.manual_seed(123)  # nor does it matter what else was drawn
        before = torch.get_rng_state()
        again = segments.build_segments(tmp_path / "elsewhere", TINY, processes=1)
        assert torch.equal(torch.get_rng_state(), before)
        one = prints(zoo)
        assert one == prints(again)
        weights = {value for name, value in one.items() if name.endswith(".safetensors")}
        assert len(weights) == len(MODELS)
        assert json.loads((again / "manifest.json").read_text())["dice"].keys() == set(MODELS)

    def test_reused_when_complete_and_made_again_when_settings_differ(self, tmp_path: Path) -> None:
        # No training: what is tested is what is kept and what is replaced.
        out = segments.build_segments(tmp_path / "segments", IDLE, processes=1)
        (out / "mine.txt").write_text("still here")
        assert segments.build_segments(out, IDLE, processes=1) == out
        assert (out / "mine.txt").exists()
        old = prints(out)
        other = dataclasses.replace(IDLE, seed=1)
        assert not segments.is_complete(out, other)
        segments.build_segments(out, other, processes=1)
        assert segments.is_complete(out, other)
        assert not (out / "mine.txt").exists()
        assert prints(out)["base/model.safetensors"] != old["base/model.safetensors"]
        assert list(tmp_path.iterdir()) == [out]

    def test_an_interrupted_build_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(segments, "save_items", fail)
        with pytest.raises(KeyboardInterrupt):
            segments.build_segments(tmp_path / "segments", IDLE, processes=1)
        assert not list(tmp_path.iterdir())

    def test_a_folder_of_something_else_is_left_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match="expected a new folder or a segments zoo"):
            segments.build_segments(tmp_path, TINY, processes=1)
        with pytest.raises(SystemExit) as caught:
            segments.main(["--out", str(tmp_path)])
        assert caught.value.code == 2
        assert "choose another" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_experts_fit_their_base(self, zoo: Path) -> None:
        experts = [open_checkpoint(str(zoo / name)) for name in segments.EXPERTS]
        layout = check_family(open_checkpoint(str(zoo / "base")), experts)
        model = load_model(str(zoo / "base"), "AutoModelForMaskGeneration")
        assert layout.parameters == sum(parameter.numel() for parameter in model.parameters())

    def test_items_are_those_that_were_drawn(self, zoo: Path) -> None:
        from datasets import load_from_disk

        data = load_from_disk(str(zoo / "data")).with_format("numpy")
        assert {split: len(data[split]) for split in SPLITS} == {
            name: 4 * count for name, count in SIZES.items()
        }
        drawn = split_lesions(SIZES, "validation", TINY.seed)
        found = data["validation"][:]
        for column, attribute in (("pixels", "pixels"), ("boxes", "boxes"), ("mask", "masks")):
            expected = np.concatenate([getattr(items, attribute) for items in drawn.values()])
            np.testing.assert_array_equal(found[column], expected)
        assert found["mask"].max() == 1
        ids = [key for split in SPLITS for key in data[split][:]["id"]]
        assert len(set(ids)) == len(ids)

    def test_the_manifest_says_what_the_evaluator_finds(self, zoo: Path) -> None:
        assert_manifest_agrees(zoo, "sonography")


def assert_manifest_agrees(zoo: Path, name: str) -> None:
    """The scores of the manifest are those of the ``segmentation`` evaluator on the test items."""
    evaluator = opened(
        {
            "kind": "segmentation",
            "data": str(zoo / "data"),
            "domain": "domain",
            "id": "id",
            "objectives": [{"name": domain, "domains": [domain]} for domain in DOMAINS],
        }
    )
    assert evaluator.model_class is not None
    model = load_model(str(zoo / name), evaluator.model_class)
    measured = evaluator.evaluate(Candidate(recipe_at([0.0]), model), "test")
    recorded = json.loads((zoo / "manifest.json").read_text())["dice"][name]
    assert measured.values == pytest.approx(recorded, abs=1e-6)
