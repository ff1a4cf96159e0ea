"""Segmentation gives the figures of a plain loop over masks, and refuses bad data."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from mergesearch.evaluators import SPLITS, Batch, Candidate, Evaluator, Measurement
from mergesearch.evaluators.spec.evaluators import EVALUATORS, parse_evaluators
from mergesearch.merging import InputError, NonFiniteError
from mergesearch.merging.models.loading import load_model
from tests.evaluators.items import DOMAINS, build, opened, recipe_at
from tests.evaluators.masks import (
    CLASSES,
    COUNT,
    SIDE,
    pico_sam,
    pico_segformer,
    plain_dice,
    plain_iou,
    splits,
    stored,
)

METRICS = ("dice", "iou", "cross_entropy")
RECIPE = recipe_at([0.0])


def section(data: Path | str, *metrics: str, **options: Any) -> dict[str, Any]:
    """A ``segmentation`` section with the usual columns."""
    chosen = [{"metric": metric} for metric in metrics or METRICS]
    usual = {
        "kind": "segmentation",
        "data": str(data),
        "domain": "domain",
        "id": "id",
        "objectives": chosen,
    }
    return usual | options


SEMANTIC = {"inputs": {"pixel_values": "pixels"}}


def measure(evaluator: Evaluator, model: Any, split: Any = "search") -> Measurement:
    return evaluator.evaluate(Candidate(RECIPE, model), split)


def plain_loop(
    logits: torch.Tensor, masks: Any, classes: list[int]
) -> dict[str, npt.NDArray[np.float64]]:
    """All three metrics of each item from logits ``(items, classes, height, width)``."""
    answers = logits.argmax(dim=1).numpy()
    log_p = logits.double().log_softmax(dim=1).numpy()
    losses = [
        -np.take_along_axis(p, m[None], axis=0).mean() for p, m in zip(log_p, masks, strict=True)
    ]
    pairs = list(zip(answers, masks, strict=True))
    return {
        "dice": np.array([plain_dice(a, m, classes) for a, m in pairs]),
        "iou": np.array([plain_iou(a, m, classes) for a, m in pairs]),
        "cross_entropy": np.array(losses),
    }


def refusal(*sections: dict[str, Any]) -> str:
    """The message with which checking and opening an evaluator refuses, one line."""
    with pytest.raises(InputError) as caught:
        opened(*sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def sam() -> Any:
    return pico_sam()


@pytest.fixture(scope="module")
def segformer() -> Any:
    return pico_segformer()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("masks") / "data", splits())


class TestPromptable:
    @pytest.mark.parametrize("split", SPLITS)
    def test_agrees_with_a_plain_loop_item_by_item(self, sam: Any, data: Path, split: Any) -> None:
        table = splits()[split]
        boxes = torch.tensor(table["boxes"])
        pixels = torch.tensor(table["pixels"])[:, None]
        with torch.no_grad():
            small = sam(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks[
                :, 0
            ]
        assert small.shape == (COUNT, 1, 8, 8)
        large = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
        logits = torch.cat([torch.zeros_like(large), large], dim=1)
        expected = plain_loop(logits, (table["mask"] > 0).astype(int), [1])
        measured = measure(opened(section(data)), sam, split)
        for metric in METRICS:
            np.testing.assert_allclose(
                measured.items[metric], expected[metric], atol=1e-5, err_msg=metric
            )
            assert measured.values[metric] == pytest.approx(expected[metric].mean(), abs=1e-6)
        assert 0.05 < measured.values["dice"] < 0.95

    def test_points_in_the_place_of_boxes(self, sam: Any, data: Path) -> None:
        table = splits()["search"]
        inputs = {"pixel_values": "pixels", "input_points": "points"}
        measured = measure(opened(section(data, "iou", inputs=inputs)), sam)
        with torch.no_grad():
            small = sam(
                pixel_values=torch.tensor(table["pixels"])[:, None],
                input_points=torch.tensor(table["points"]),
                multimask_output=False,
            ).pred_masks[:, 0]
        large = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")[:, 0]
        pairs = zip((large > 0).numpy(), table["mask"] > 0, strict=True)
        np.testing.assert_allclose(measured.items["iou"], [plain_iou(a, m, [1]) for a, m in pairs])

    def test_several_masks_proposed(self, sam: Any, data: Path) -> None:
        one, several = (
            measure(opened(section(data, multimask=flag)), sam) for flag in (False, True)
        )
        assert one.values != several.values

    def test_another_background(self, sam: Any, data: Path) -> None:
        results = {
            b: measure(opened(section(data, "dice", background=b)), sam).values["dice"]
            for b in (0, 1, None)
        }
        assert len(set(results.values())) == 3

    def test_the_auto_class_loads_it(self, sam: Any, data: Path, tmp_path: Path) -> None:
        sam.save_pretrained(tmp_path / "sam")
        evaluator = opened(section(data))
        assert evaluator.model_class == "AutoModelForMaskGeneration"
        loaded = load_model(str(tmp_path / "sam"), evaluator.model_class)
        assert measure(evaluator, loaded).values == measure(evaluator, sam).values


class TestSemantic:
    def test_agrees_with_a_plain_loop_item_by_item(self, segformer: Any, data: Path) -> None:
        table = splits()["search"]
        with torch.no_grad():
            small = segformer(pixel_values=torch.tensor(table["pixels"])[:, None]).logits
        assert small.shape == (COUNT, CLASSES, 8, 8)
        logits = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
        for background, classes in ((0, [1, 2]), (None, [0, 1, 2])):
            expected = plain_loop(logits, table["mask"].astype(int), classes)
            measured = measure(opened(section(data, background=background, **SEMANTIC)), segformer)
            for metric in METRICS:
                np.testing.assert_allclose(
                    measured.items[metric], expected[metric], atol=1e-5, err_msg=metric
                )
        assert len(np.unique(logits.argmax(dim=1))) == CLASSES

    def test_the_auto_class_loads_it(self, segformer: Any, data: Path, tmp_path: Path) -> None:
        segformer.save_pretrained(tmp_path / "segformer")
        evaluator = opened(section(data, **SEMANTIC))
        assert evaluator.model_class == "AutoModelForSemanticSegmentation"
        loaded = load_model(str(tmp_path / "segformer"), evaluator.model_class)
        assert measure(evaluator, loaded).values == measure(evaluator, segformer).values

    def test_pixels_that_are_ignored_count_nowhere(self, segformer: Any, tmp_path: Path) -> None:
        tables = splits()
        for table in tables.values():
            table["mask"][:, :4] = 255
        data = stored(tmp_path / "data", tables)
        measured = measure(opened(section(data, ignored=255, **SEMANTIC)), segformer)
        with torch.no_grad():
            pixels = torch.tensor(tables["search"]["pixels"])[:, None]
            small = segformer(pixel_values=pixels).logits
        logits = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")[
            :, :, 4:
        ]
        expected = plain_loop(logits, tables["search"]["mask"][:, 4:].astype(int), [1, 2])
        for metric in METRICS:
            np.testing.assert_allclose(
                measured.items[metric], expected[metric], atol=1e-5, err_msg=metric
            )

    def test_more_classes_than_the_model_has_are_refused(
        self, segformer: Any, tmp_path: Path
    ) -> None:
        tables = splits()
        tables["search"]["mask"][3, 5, 5] = 255
        evaluator = opened(section(stored(tmp_path / "data", tables), **SEMANTIC))
        with pytest.raises(
            InputError, match=r"class numbers 0 to 2.*received 255; .*evaluators\.0\.ignored"
        ):
            measure(evaluator, segformer)


@pytest.mark.parametrize("kind", ["sam", "segformer"])
class TestContract:
    def options(self, kind: str) -> dict[str, Any]:
        return {} if kind == "sam" else SEMANTIC

    def test_declares_what_it_gives(self, kind: str, data: Path) -> None:
        evaluator = build(section(data, **self.options(kind)))
        results = {objective.name: objective.direction for objective in evaluator.objectives}
        assert results == {"dice": "maximize", "iou": "maximize", "cross_entropy": "minimize"}
        assert evaluator.provides == {"items", "gradient"}
        assert build(section(data, "dice", "iou", **self.options(kind))).provides == {"items"}

    def test_batch_size_does_not_matter(
        self, kind: str, data: Path, request: pytest.FixtureRequest
    ) -> None:
        model = request.getfixturevalue(kind)
        whole = measure(opened(section(data, **self.options(kind))), model)
        again = measure(opened(section(data, **self.options(kind))), model)
        parts = measure(opened(section(data, batch_size=3, **self.options(kind))), model)
        assert whole.values == again.values
        for metric in METRICS:
            np.testing.assert_allclose(parts.items[metric], whole.items[metric], atol=1e-5)

    def test_fewer_items_are_some_of_all(
        self, kind: str, data: Path, request: pytest.FixtureRequest
    ) -> None:
        model = request.getfixturevalue(kind)
        evaluator = opened(section(data, **self.options(kind)))
        whole = measure(evaluator, model).items["cross_entropy"]
        part = evaluator.evaluate(Candidate(RECIPE, model), "search", 4).items["cross_entropy"]
        assert part.shape == (4,)
        assert all(np.isclose(whole, score, atol=1e-5).any() for score in part)
        assert evaluator.cost("search") == COUNT
        assert evaluator.cost("search", 4) == 4

    def test_domains(self, kind: str, data: Path, request: pytest.FixtureRequest) -> None:
        model = request.getfixturevalue(kind)
        options = self.options(kind)
        objectives = [{"name": name, "domains": [name]} for name in DOMAINS] + [{"reduce": "worst"}]
        values = measure(
            opened(section(data, **options) | {"objectives": objectives}), model
        ).values
        mean = measure(opened(section(data, "dice", **options)), model).values["dice"]
        assert (values["day"] + values["night"]) / 2 == pytest.approx(mean, abs=1e-12)
        assert values["worst dice"] == min(values["day"], values["night"])

    def test_a_logit_that_is_not_finite_fails_the_trial(self, kind: str, data: Path) -> None:
        model = pico_sam() if kind == "sam" else pico_segformer()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        for metric in METRICS:
            with pytest.raises(NonFiniteError, match=metric):
                measure(opened(section(data, metric, **self.options(kind))), model)

    def test_gradient_of_cross_entropy_agrees_with_a_small_step(
        self, kind: str, data: Path
    ) -> None:
        model = (pico_sam() if kind == "sam" else pico_segformer()).double()
        evaluator = opened(section(data, "cross_entropy", **self.options(kind)))
        candidate = Candidate(RECIPE, model)
        slope = evaluator.backward(candidate, Batch(0), {"cross_entropy": 1.0})  # type: ignore[attr-defined]
        before = measure(evaluator, model).values["cross_entropy"]
        assert slope.loss == pytest.approx(before, rel=1e-6)
        moved = [p for p in model.parameters() if p.grad is not None and bool((p.grad != 0).any())]
        assert len(moved) > 5
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in moved))
        step = 1e-6 / norm
        with torch.no_grad():
            for parameter in moved:
                parameter.sub_(step * parameter.grad)
        after = measure(evaluator, model).values["cross_entropy"]
        assert (before - after) / step == pytest.approx(norm**2, rel=1e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objectives": [{"metric": "accuracy"}]}, "dice"),
            ({"inputs": {"mask": "mask"}}, "received mask"),
            ({"inputs": {}}, "at least 1"),
            ({"ignored": 0}, "to differ"),
            ({"background": -1}, "greater than or equal to 0"),
            ({"label": "label"}, "label"),
            ({"mask": None}, "mask"),
        ],
    )
    def test_keys(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            parse_evaluators([section("data") | options])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask": "masks"}, r"expected a column 'masks'"),
            ({"mask": "pixels"}, r"arrays of class numbers in column 'pixels', received"),
            (
                {"mask": "rows"},
                r"evaluators\.0\.mask: expected masks \(height, width\).*received shape \(4,\)",
            ),
            ({"inputs": {"pixel_values": "domain"}}, r"arrays of numbers in column 'domain'"),
        ],
    )
    def test_columns(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        tables = splits()
        for table in tables.values():
            table["rows"] = np.arange(4 * COUNT).reshape(COUNT, 4)
        with pytest.raises(InputError, match=message):
            opened(section(stored(tmp_path / "data", tables), **options))

    def test_masks_of_different_sizes(self, tmp_path: Path) -> None:
        tables = splits()
        for table in tables.values():
            table["mask"] = [
                mask[: 8 + index % 2].tolist() for index, mask in enumerate(table["mask"])
            ]
        assert "column of mask: expected arrays of one shape" in refusal(
            section(stored(tmp_path / "data", tables))
        )

    def test_the_mask_does_not_tell_items_apart(self, tmp_path: Path) -> None:
        tables = splits()
        for table in tables.values():
            table["mask"] = np.ones_like(table["mask"])
        opened(section(stored(tmp_path / "one", tables), id=None))
        tables["test"]["pixels"][0] = tables["search"]["pixels"][0]
        assert "expected disjoint splits" in refusal(
            section(stored(tmp_path / "two", tables), id=None)
        )

    def test_specs_are_checked_without_torch(self) -> None:
        code = (
            "import sys; from pathlib import Path\n"
            "from mergesearch.evaluators.spec.evaluators import "
            "parse_evaluators, build_evaluator; "
            f"build_evaluator(parse_evaluators([{section('data')!r}]), Path()); "
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_it_is_listed(self) -> None:
        assert "segmentation" in EVALUATORS
