"""The contract of an evaluator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mergesearch.evaluators import SPLITS, Candidate, Evaluator
from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators
from mergesearch.merging import Field, Recipe, Source

#: Contract -> its model, made once.
_MODELS: dict[type, Any] = {}


class EvaluatorContract:
    """Tests of an evaluator. Subclass it with a name that begins with ``Test``.

    Attributes:
        section: Its section of a study file, with ``kind``.
    """

    section: ClassVar[Mapping[str, Any]]

    def model(self) -> Any:
        """The model that is evaluated; for evaluators that need one, override it."""
        return None

    def test_the_section_survives_the_way_to_a_worker(self) -> None:
        """It is sent as plain data."""
        specs = parse_evaluators([self.section])
        plain = [spec.model_dump(mode="json") for spec in specs]
        assert parse_evaluators(plain) == specs

    def test_objectives_are_known_before_items_are_read(self) -> None:
        """The driver never opens an evaluator."""
        evaluator = self._closed()
        names = [objective.name for objective in evaluator.objectives]
        assert names
        assert len(set(names)) == len(names)
        assert {o.direction for o in evaluator.objectives} <= {"maximize", "minimize"}

    def test_every_split_is_measured(self) -> None:
        """Every objective has a finite value, and sizes and costs are known before."""
        closed = self._closed()
        for split in SPLITS:
            measured = self._opened().evaluate(self._candidate(), split)
            assert {*measured.values} == {objective.name for objective in closed.objectives}
            assert all(math.isfinite(value) for value in measured.values.values())
            longest = max((scores.size for scores in measured.items.values()), default=0)
            assert closed.size(split) == 0 or closed.size(split) >= longest
            assert closed.cost(split) >= 1

    def test_the_same_model_scores_the_same(self) -> None:
        """Again, and in another worker."""
        one = self._opened().evaluate(self._candidate(), "search")
        two = self._opened().evaluate(self._candidate(), "search")
        assert dict(one.values) == dict(two.values)

    def test_items_are_promised_and_kept(self) -> None:
        """Where scores of items are provided, every objective has them."""
        evaluator = self._opened()
        if "items" not in evaluator.provides:
            pytest.skip("it provides no items")
        measured = evaluator.evaluate(self._candidate(), "search")
        assert {*measured.items} == {*measured.values}
        part = evaluator.evaluate(self._candidate(), "search", 2)
        assert all(0 < scores.size <= 2 for scores in part.items.values())

    def test_global_generators_are_left_alone(self) -> None:
        """Other evaluators and strategies would draw otherwise after it."""
        before = np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
        self._opened().evaluate(self._candidate(), "search")
        assert np.random.get_state()[1].tobytes() == before  # type: ignore[index]  # noqa: NPY002

    def _closed(self) -> Evaluator:
        evaluator = build_evaluator(parse_evaluators([self.section]), Path())
        evaluator.check()
        return evaluator

    def _opened(self) -> Evaluator:
        evaluator = self._closed()
        evaluator.open()
        return evaluator

    def _candidate(self) -> Candidate:
        field = Field.constant(4, [0.3])
        recipe = Recipe(Source("base", "base"), (), "task_arithmetic", field)
        if type(self) not in _MODELS:
            _MODELS[type(self)] = self.model()
        return Candidate(recipe, _MODELS[type(self)])
