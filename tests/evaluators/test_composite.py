"""Composite: members side by side, nothing lost, nothing mixed up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import (
    SPLITS,
    Batch,
    Candidate,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)
from mergesearch.evaluators.composite import Composite
from mergesearch.evaluators.synthetic import Faults, Synthetic
from mergesearch.merging import InputError, NonFiniteError
from tests.evaluators.items import build, candidate_at, classification, opened, pico_vit

SPHERE = {"kind": "synthetic", "problem": "sphere", "items": 8, "noise": 0.1}
TASKS = {"kind": "synthetic", "problem": "quadratic_tasks"}


class Recorder:
    """An evaluator that writes down what is asked of it."""

    def __init__(self, name: str, provides: set[str], model_class: str | None = None) -> None:
        self.objectives = (Objective(name, "maximize"),)
        self.provides = frozenset(provides)
        self.differentiable = (name,) if "gradient" in provides else ()
        self.proxies: tuple[str, ...] = ()
        self.transductive = False
        self.constraints: tuple[str, ...] = ()
        self.additive: tuple[str, ...] = ()
        self.model_class = model_class
        self.calls: list[str] = []

    def check(self) -> None:
        self.calls.append("check")

    def open(self) -> None:
        self.calls.append("open")

    def size(self, split: Split) -> int:
        return 3

    def cost(self, split: Split, items: int | None = None) -> int:
        return 3 if items is None else min(items, 3)

    def evaluate(self, candidate: Candidate, split: Split, items: int | None = None) -> Measurement:
        self.calls.append(split)
        return Measurement({self.objectives[0].name: 1.0})

    def batch_cost(self, batch: Batch) -> int:
        return batch.size or 0

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        self.calls.append("backward")
        return LossAndGradient(sum(weights.values()))


class TestComposite:
    @pytest.mark.parametrize("split", SPLITS)
    def test_measures_what_the_members_measure(self, data: Path, model: Any, split: Any) -> None:
        sections = [
            SPHERE,
            classification(data, {"metric": "accuracy"}, {"metric": "cross_entropy"}),
        ]
        whole = opened(*sections)
        parts = [opened(section) for section in sections]
        candidate = candidate_at([0.1, 0.7], model)
        measured = whole.evaluate(candidate, split)
        alone = [part.evaluate(candidate, split) for part in parts]
        assert whole.objectives == (*parts[0].objectives, *parts[1].objectives)
        assert measured.values == {**alone[0].values, **alone[1].values}
        assert measured.errors == {**alone[0].errors, **alone[1].errors}
        assert list(measured.items) == ["sphere", "accuracy", "cross_entropy"]
        for part in alone:
            for name, scores in part.items.items():
                np.testing.assert_array_equal(measured.items[name], scores)

    def test_provides_the_items_of_all_and_the_gradients_of_any(self) -> None:
        mixed = Composite([Recorder("a", {"items", "gradient"}), Recorder("b", {"items"})])
        assert mixed.provides == {"items", "gradient"}
        assert mixed.differentiable == ("a",)
        assert Composite([Recorder("a", {"items"}), Recorder("b", set())]).provides == set()
        assert build(SPHERE, TASKS).provides == {"gradient"}

    def test_runs_backwards_what_has_a_weight(self) -> None:
        members = [Recorder("a", {"gradient"}), Recorder("b", {"gradient"}), Recorder("c", set())]
        slope = Composite(members).backward(candidate_at([0.0]), Batch(size=3), {"a": 2.0})
        assert slope.loss == 2.0
        assert [member.calls for member in members] == [["backward"], [], []]
        assert Composite(members).batch_cost(Batch(size=3)) == 2 * 3

    def test_is_transductive_where_a_member_is(self) -> None:
        members = [Recorder(name, set()) for name in "ab"]
        assert not Composite(members).transductive
        members[1].transductive = True
        assert Composite(members).transductive

    def test_members_are_checked_opened_and_run_once_each(self) -> None:
        members = [Recorder(name, set()) for name in "abc"]
        whole = Composite(members)
        whole.check()
        whole.open()
        whole.evaluate(candidate_at([0.0]), "validation")
        assert [member.calls for member in members] == [["check", "open", "validation"]] * 3

    def test_the_check_of_any_member_counts(self, data: Path) -> None:
        with pytest.raises(InputError, match=r"^evaluators\.1\.data: expected a folder"):
            build(SPHERE, classification(data / "absent")).check()

    def test_the_model_class_is_that_of_the_members_with_a_model(self, data: Path) -> None:
        assert build(SPHERE, TASKS).model_class is None
        assert build(SPHERE, classification(data)).model_class == "AutoModelForImageClassification"

    def test_one_kind_of_model_per_study(self) -> None:
        with pytest.raises(
            InputError, match=r"received \['AutoModel', 'AutoModelForCausalLM'\]; use two studies"
        ):
            Composite(
                [Recorder("a", set(), "AutoModel"), Recorder("b", set(), "AutoModelForCausalLM")]
            )

    def test_names_are_unique_across_members(self) -> None:
        with pytest.raises(
            InputError, match=r"^evaluators: .*\['sphere'\] twice; give one a name"
        ) as caught:
            build(SPHERE, TASKS, SPHERE | {"seed": 1})
        assert "\n" not in str(caught.value)

    def test_what_goes_wrong_in_a_member_comes_through(self, data: Path) -> None:
        import torch

        model = pico_vit()
        with torch.no_grad():
            model.classifier.bias.fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="objective 'accuracy'"):
            opened(TASKS, classification(data)).evaluate(candidate_at([0.0], model), "search")
        broken = Composite([Synthetic("sphere"), Synthetic("zdt1", faults=Faults(error=1.0))])
        with pytest.raises(RuntimeError, match="fault injection"):
            broken.evaluate(candidate_at([0.0, 0.0]), "search")
