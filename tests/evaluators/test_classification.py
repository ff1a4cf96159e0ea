"""Classification gives the figures of a plain loop over items, and refuses bad data early."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators import SPLITS, Candidate, Evaluator, Measurement
from mergesearch.evaluators.objectives import Metric
from mergesearch.evaluators.reduction import reduce_metric, score_domains
from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.merging import InputError, NonFiniteError
from tests.evaluators.items import (
    DOMAINS,
    LABELS,
    build,
    classification,
    columns,
    opened,
    pico_vit,
    recipe_at,
    save,
    three_splits,
)
from tests.waiting import PATIENT

RECIPE = recipe_at([0.0])
ACCURACY = {"metric": "accuracy"}
LOSS = {"metric": "cross_entropy"}


def plain_loop(model: Any, table: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Accuracy and cross-entropy of each item, one image at a time, by their definitions."""
    right = []
    losses = []
    for pixels, label in zip(table["pixels"], table["label"], strict=True):
        with torch.no_grad():
            logits = model(pixel_values=torch.tensor(pixels)[None, None]).logits[0].double()
        right.append(float(int(logits.argmax()) == label))
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
    return {"accuracy": np.array(right), "cross_entropy": np.array(losses)}


def measure(evaluator: Evaluator, model: Any, split: Any = "search") -> Measurement:
    return evaluator.evaluate(Candidate(RECIPE, model), split)


def refusal(*sections: dict[str, Any], folder: Path = Path()) -> str:
    """The message with which building or checking an evaluator refuses, one line."""
    with pytest.raises(InputError) as caught:
        build(*sections, folder=folder).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestScores:
    @pytest.mark.parametrize("split", SPLITS)
    def test_agrees_with_a_plain_loop_item_by_item(
        self, model: Any, data: Path, split: Any
    ) -> None:
        expected = plain_loop(model, three_splits()[split])
        measured = measure(opened(classification(data, ACCURACY, LOSS)), model, split)
        np.testing.assert_array_equal(measured.items["accuracy"], expected["accuracy"])
        np.testing.assert_allclose(
            measured.items["cross_entropy"], expected["cross_entropy"], atol=1e-5
        )
        for name, scores in expected.items():
            assert measured.values[name] == pytest.approx(scores.mean(), abs=1e-6)
        assert (
            0 < measured.values["accuracy"] < 1
        )  # a model that is always right or wrong would prove little

    @pytest.mark.parametrize(("metric", "worst"), [("accuracy", min), ("cross_entropy", max)])
    def test_domains_and_the_worst_of_them(
        self, model: Any, data: Path, metric: str, worst: Any
    ) -> None:
        table = three_splits()["search"]
        scores = plain_loop(model, table)[metric]
        domains = np.array(table["domain"])
        means = {name: scores[domains == name].mean() for name in DOMAINS}
        assert means["day"] != means["night"]
        cases = {
            "day": ({"domains": ["day"]}, means["day"], domains == "day"),
            "night": ({"domains": ["night"]}, means["night"], domains == "night"),
            "both": (
                {"domains": ["night", "day"]},
                (means["day"] + means["night"]) / 2,
                domains != "",
            ),
            "worst": (
                {"reduce": "worst"},
                worst(means.values()),
                domains == worst(means, key=means.__getitem__),
            ),
            "worst day": ({"reduce": "worst", "domains": ["day"]}, means["day"], domains == "day"),
        }
        objectives = [
            {"metric": metric, "name": name, **options} for name, (options, _, _) in cases.items()
        ]
        measured = measure(opened(classification(data, *objectives)), model)
        for name, (_, value, rows) in cases.items():
            assert measured.values[name] == pytest.approx(value, abs=1e-6), name
            np.testing.assert_allclose(measured.items[name], scores[rows], atol=1e-5, err_msg=name)

    def test_standard_error_of_an_accuracy_is_binomial(self, model: Any, data: Path) -> None:
        measured = measure(opened(classification(data, ACCURACY, domain=None)), model)
        share = measured.values["accuracy"]
        assert measured.errors["accuracy"] == pytest.approx(
            math.sqrt(share * (1 - share) / 20), rel=1e-12
        )

    def test_standard_error_of_domains_is_that_of_independent_means(
        self, model: Any, data: Path
    ) -> None:
        objectives = [LOSS, *({"name": name, "domains": [name]} | LOSS for name in DOMAINS)]
        measured = measure(opened(classification(data, *objectives)), model)
        for name in DOMAINS:
            scores = measured.items[name]
            assert measured.errors[name] == pytest.approx(
                np.sqrt(np.var(scores) / len(scores)), rel=1e-12
            )
        expected = math.hypot(*(measured.errors[name] for name in DOMAINS)) / 2
        assert measured.errors["cross_entropy"] == pytest.approx(expected, rel=1e-12)

    def test_every_domain_weighs_the_same_however_many_items_it_has(self) -> None:
        scores = np.array([1.0, 1.0, 1.0, 0.0])
        domains = np.array(["day", "day", "day", "night"])
        result = reduce_metric(Metric(), score_domains(scores, domains))
        assert (result.value, result.error) == (0.5, 0.0)
        np.testing.assert_array_equal(result.items, scores)
        assert result.weights is not None
        assert result.weights @ result.items == pytest.approx(0.5)

    @given(
        scores=st.lists(st.floats(0, 10), min_size=4, max_size=40),
        metric=st.sampled_from(["accuracy", "cross_entropy"]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=40, deadline=None)
    def test_the_worst_domain_is_no_better_than_the_mean(
        self, scores: list[float], metric: Any, seed: int
    ) -> None:
        domains = np.array([f"d{number % 3}" for number in range(len(scores))])
        array = np.array(scores)
        by_domain = score_domains(array, domains)
        mean, worst = (
            reduce_metric(Metric(None, metric, None, how), by_domain).value
            for how in ("mean", "worst")
        )
        assert worst <= mean + 1e-12 if metric == "accuracy" else worst >= mean - 1e-12
        order = np.random.default_rng(seed).permutation(len(scores))
        again = reduce_metric(
            Metric(None, metric), score_domains(array[order], domains[order])
        ).value
        assert again == pytest.approx(mean, abs=1e-12)

    def test_batch_size_does_not_matter(self, model: Any, data: Path) -> None:
        whole = measure(opened(classification(data, ACCURACY, LOSS)), model)
        for size in (1, 3, 19):
            parts = measure(opened(classification(data, ACCURACY, LOSS, batch_size=size)), model)
            np.testing.assert_array_equal(parts.items["accuracy"], whole.items["accuracy"])
            np.testing.assert_allclose(
                parts.items["cross_entropy"], whole.items["cross_entropy"], rtol=0, atol=1e-6
            )
            assert parts.values == pytest.approx(whole.values, abs=1e-6)

    def test_scores_follow_the_weights_in_place(self, data: Path) -> None:
        model = pico_vit(0)
        other = pico_vit(1)
        evaluator = opened(classification(data, LOSS))
        before = measure(evaluator, model)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
                parameter.copy_(value)
        after = measure(evaluator, model)
        assert after.values == measure(evaluator, other).values != before.values

    def test_items_take_the_type_of_the_model(self, model: Any, data: Path) -> None:
        evaluator = opened(classification(data, LOSS))
        full = measure(evaluator, model)
        half = measure(evaluator, copy.deepcopy(model).bfloat16())
        np.testing.assert_allclose(
            half.items["cross_entropy"], full.items["cross_entropy"], atol=0.5
        )
        assert half.values != full.values


class TestNonFinite:
    @pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite_name_the_objective(
        self, data: Path, metric: str, value: float
    ) -> None:
        model = pico_vit()
        with torch.no_grad():
            model.classifier.bias[0] = value
        with pytest.raises(NonFiniteError, match="objective 'mine'"):
            measure(opened(classification(data, {"metric": metric, "name": "mine"})), model)

    def test_one_bad_item_is_enough(self, model: Any, tmp_path: Path) -> None:
        splits = three_splits()
        splits["search"]["pixels"][4][0][0] = math.nan  # an item of the first domain
        save(tmp_path / "data", splits)
        for objective in (ACCURACY, LOSS, {"reduce": "worst"}, {"domains": ["day"]}):
            evaluator = opened(
                classification("data", objective | {"name": "mine"}), folder=tmp_path
            )
            with pytest.raises(NonFiniteError, match="objective 'mine'"):
                measure(evaluator, model)
            assert measure(evaluator, model, "test").values
        other = opened(classification("data", {"domains": ["night"]}), folder=tmp_path)
        assert math.isfinite(measure(other, model).values["accuracy[night]"])


class TestNames:
    def test_made_from_the_rest_unless_given(self, data: Path) -> None:
        objectives = [
            ACCURACY,
            LOSS,
            {"metric": "accuracy", "domains": ["day"]},
            {"metric": "cross_entropy", "domains": ["day", "night"]},
            {"metric": "accuracy", "reduce": "worst"},
            {"metric": "accuracy", "reduce": "worst", "domains": ["day", "night"]},
            {"metric": "accuracy", "name": "mine"},
        ]
        evaluator = build(classification(data, *objectives))
        assert [(objective.name, objective.direction) for objective in evaluator.objectives] == [
            ("accuracy", "maximize"),
            ("cross_entropy", "minimize"),
            ("accuracy[day]", "maximize"),
            ("cross_entropy[day, night]", "minimize"),
            ("worst accuracy", "maximize"),
            ("worst accuracy[day, night]", "maximize"),
            ("mine", "maximize"),
        ]

    def test_accuracy_is_the_default(self, data: Path) -> None:
        assert [objective.name for objective in build(classification(data)).objectives] == [
            "accuracy"
        ]

    def test_two_of_one_name_are_refused(self, data: Path) -> None:
        message = refusal(
            classification(data, ACCURACY, LOSS, {"name": "accuracy", "domains": ["day"]})
        )
        assert message.startswith("evaluators.0.objectives: ")
        assert "['accuracy'] twice" in message

    def test_a_domain_counts_once(self, data: Path) -> None:
        message = refusal(classification(data, {"domains": ["day", "day"]}))
        assert message.startswith("evaluators.0.objectives: expected each domain once")

    @pytest.mark.parametrize("objective", [{"domains": ["day"]}, {"reduce": "worst"}])
    def test_domains_need_a_column(self, data: Path, objective: dict[str, Any]) -> None:
        message = refusal(classification(data, objective, domain=None))
        assert message.startswith("evaluators.0.domain: required key is missing")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("batch_size", 0),
            ("objectives", [{"domains": []}]),
            ("folder", "x"),
            ("splits", {"a": "b"}),
        ],
    )
    def test_the_study_file_refuses_other_keys_and_values(
        self, data: Path, key: str, value: Any
    ) -> None:
        with pytest.raises(ValueError, match=key):
            parse_evaluators([classification(data) | {key: value}])


class TestFolders:
    def test_several_shards_are_one_split_in_order(
        self, model: Any, data: Path, tmp_path: Path
    ) -> None:
        save(tmp_path / "data", three_splits(), shards=3)
        assert len(list((tmp_path / "data" / "search").glob("*.arrow"))) == 3
        section = classification("data", LOSS)
        one = measure(opened(section, folder=data.parent), model)
        many = measure(opened(section, folder=tmp_path), model)
        np.testing.assert_array_equal(one.items["cross_entropy"], many.items["cross_entropy"])

    def test_other_names_of_splits_and_columns(
        self, model: Any, data: Path, tmp_path: Path
    ) -> None:
        names = {"search": "train", "validation": "dev", "test": "held out"}
        renamed = {"pixels": "image", "label": "class", "domain": "site", "id": "key"}
        splits = {
            names[split]: {renamed[column]: values for column, values in table.items()}
            for split, table in three_splits().items()
        }
        save(tmp_path / "data", splits)
        options = {"input": "image", "label": "class", "domain": "site", "id": "key"}
        one = opened(classification(tmp_path / "data", LOSS, splits=names, **options))
        for split in SPLITS:
            expected = measure(opened(classification(data, LOSS)), model, split)
            assert measure(one, model, split).values == expected.values

    @pytest.mark.parametrize("channel", [False, True])
    def test_class_labels_and_typed_images(
        self, model: Any, data: Path, tmp_path: Path, channel: bool
    ) -> None:
        from datasets import Array2D, Array3D, ClassLabel, Features, Value

        splits = three_splits()
        for table in splits.values():
            table["domain"] = [("night", "day").index(name) for name in table["domain"]]
            table["pixels"] = [[image] for image in table["pixels"]] if channel else table["pixels"]
        features = Features(
            pixels=Array3D((1, 8, 8), "float32") if channel else Array2D((8, 8), "float32"),
            label=ClassLabel(names=[f"class {number}" for number in range(LABELS)]),
            domain=ClassLabel(names=["night", "day"]),
            id=Value("string"),
        )
        save(tmp_path / "data", splits, features)
        objectives = [LOSS, {"name": "day", "domains": ["day"]} | LOSS]
        for options in ({}, {"id": None}):
            typed = measure(
                opened(classification("data", *objectives, **options), folder=tmp_path), model
            )
            assert typed.values == measure(opened(classification(data, *objectives)), model).values

    def test_domains_may_be_numbers(self, model: Any, data: Path, tmp_path: Path) -> None:
        splits = three_splits()
        for table in splits.values():
            table["domain"] = [DOMAINS.index(name) for name in table["domain"]]
        save(tmp_path / "data", splits)
        numbers = opened(classification("data", {"domains": ["1"]}), folder=tmp_path)
        names = opened(classification(data, {"domains": ["night"]}))
        assert (
            measure(numbers, model).values["accuracy[1]"]
            == measure(names, model).values["accuracy[night]"]
        )


class TestRefused:
    """Each in one line that names the key, before torch or ``datasets`` is loaded."""

    def test_missing_folder(self, tmp_path: Path) -> None:
        message = refusal(classification("nowhere"), folder=tmp_path)
        assert message.startswith("evaluators.0.data: expected a folder written by save_to_disk")
        assert str(tmp_path / "nowhere") in message

    def test_missing_split(self, tmp_path: Path) -> None:
        splits = three_splits()
        del splits["validation"]
        save(tmp_path / "data", splits)
        message = refusal(classification("data"), folder=tmp_path)
        assert "expected a readable split 'validation'" in message
        assert "['search', 'test']" in message
        # The same split in two roles is no way out.
        message = refusal(classification("data", splits={"validation": "test"}), folder=tmp_path)
        assert "received 20 items in both 'test' and 'test'" in message

    @pytest.mark.parametrize("damage", ["truncated", "garbage", "no shard", "no list of shards"])
    def test_damaged_split(self, tmp_path: Path, damage: str) -> None:
        folder = save(tmp_path / "data", three_splits()) / "test"
        shard = next(folder.glob("*.arrow"))
        if damage == "truncated":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        elif damage == "garbage":
            shard.write_bytes(b"not arrow at all")
        elif damage == "no shard":
            shard.unlink()
        else:
            (folder / "state.json").write_text(json.dumps([]))
        assert "expected a readable split 'test'" in refusal(
            classification("data"), folder=tmp_path
        )

    @pytest.mark.parametrize("role", ["input", "label", "domain", "id"])
    def test_missing_column(self, data: Path, role: str) -> None:
        message = refusal(classification(data, **{role: "colour"}))
        assert "expected a column 'colour'" in message
        assert "['domain', 'id', 'label', 'pixels']" in message

    def test_columns_of_another_type(self, data: Path) -> None:
        assert "expected class numbers in column 'id', received string" in refusal(
            classification(data, label="id")
        )
        assert "expected class numbers in column 'pixels'" in refusal(
            classification(data, label="pixels")
        )
        message = refusal(classification(data, input="domain"))
        assert "expected arrays of numbers in column 'domain', received string" in message

    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("typed", [False, True])
    def test_empty_split(self, tmp_path: Path, split: str, typed: bool) -> None:
        from datasets import Features, Sequence, Value

        features = Features(
            pixels=Sequence(Sequence(Value("float32"))),
            label=Value("int64"),
            domain=Value("string"),
            id=Value("string"),
        )
        splits = three_splits() | {split: {key: [] for key in columns(1, 0)}}
        save(tmp_path / "data", splits, features if typed else None)
        message = refusal(classification("data"), folder=tmp_path)
        assert f"expected items in split '{split}', received an empty one" in message

    def test_shared_ids(self, tmp_path: Path) -> None:
        splits = three_splits()
        splits["test"]["id"][3] = splits["search"]["id"][5]
        save(tmp_path / "data", splits)
        message = refusal(classification("data"), folder=tmp_path)
        assert "received 1 items in both 'search' and 'test', for example '0-5'" in message
        build(classification("data", id=None), folder=tmp_path).check()  # the images differ

    @pytest.mark.parametrize("typed", [False, True])
    def test_shared_images(self, tmp_path: Path, typed: bool) -> None:
        from datasets import Array2D, Features, Value

        splits = three_splits()
        splits["validation"]["pixels"][7] = splits["search"]["pixels"][0]
        types = {"label": Value("int64"), "domain": Value("string"), "id": Value("string")}
        save(
            tmp_path / "data",
            splits,
            Features(pixels=Array2D((8, 8), "float32"), **types) if typed else None,
            shards=2,
        )
        build(classification("data"), folder=tmp_path).check()  # the ids differ
        message = refusal(classification("data", id=None), folder=tmp_path)
        assert "received 1 items in both 'search' and 'validation'" in message

    @pytest.mark.parametrize("typed", [False, True])
    def test_images_that_differ_in_one_pixel_are_not_shared(
        self, tmp_path: Path, typed: bool
    ) -> None:
        from datasets import Array2D, Features, Value

        side = 64  # large enough for an abbreviated printout to leave out the middle
        splits = three_splits(2, side=side)
        for number, table in enumerate(splits.values()):
            for row, image in enumerate(table["pixels"]):
                table["pixels"][row] = np.zeros_like(image).tolist()
                table["pixels"][row][side // 2][side // 2] = 1.0 + 2 * number + row
        types = {"label": Value("int64"), "domain": Value("string"), "id": Value("string")}
        features = Features(pixels=Array2D((side, side), "float32"), **types) if typed else None
        save(tmp_path / "data", splits, features)
        build(classification("data", id=None), folder=tmp_path).check()

    def test_unknown_domain(self, data: Path) -> None:
        message = refusal(classification(data, ACCURACY, {"domains": ["day", "dusk"]}))
        assert message.startswith(
            "evaluators.0.objectives: expected domains among ['day', 'night']"
        )
        assert message.endswith("received 'dusk'")

    def test_a_domain_that_one_split_lacks(self, tmp_path: Path) -> None:
        splits = three_splits()
        splits["test"]["domain"] = ["day"] * 20
        save(tmp_path / "data", splits)
        message = refusal(classification("data", {"domains": ["night"]}), folder=tmp_path)
        assert "among ['day'] (those of the test items), received 'night'" in message

    def test_check_loads_nothing_heavy(self, data: Path, tmp_path: Path) -> None:
        overlapping = save(tmp_path / "data", dict.fromkeys(SPLITS, columns(5, 0)))
        code = """
import sys
from pathlib import Path
from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators
from mergesearch.merging import InputError
for folder in sys.argv[1:]:
    for id in ("id", None):
        section = {"kind": "classification", "data": folder, "domain": "domain", "id": id}
        try:
            build_evaluator(parse_evaluators([section]), Path()).check()
            print("fine")
        except InputError:
            print("refused")
heavy = ("torch", "datasets", "transformers", "pandas", "numba")
print([name for name in heavy if name in sys.modules])
"""
        command = [sys.executable, "-c", code, str(data), str(overlapping)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENT)
        assert done.stdout.split("\n")[:-1] == ["fine", "fine", "refused", "refused", "[]"]


def test_a_domain_that_one_split_lacks_is_refused_unless_domains_are_named(tmp_path: Path) -> None:
    splits = three_splits()
    splits["test"]["domain"] = ["day"] * 20
    data = save(tmp_path / "data", splits)
    with pytest.raises(InputError, match="received none of 'night' in 'test'; add some"):
        build(classification(data)).check()
    build(classification(data, {"metric": "accuracy", "domains": ["day"]})).check()
