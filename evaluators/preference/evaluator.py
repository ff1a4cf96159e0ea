"""An objective that a person judges: how likely the merge's outputs are preferred to the base's.

Workers make outputs for prompts and are free again. The driver shows pairs of them to a person, and
puts in the value once the choices are made (:mod:`mergesearch.search.judging`).
"""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.evaluators.base import (
    SPLITS,
    Candidate,
    Exhibit,
    ItemSubset,
    Measurement,
    Objective,
    Split,
)
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.preference.makers import Maker
from mergesearch.evaluators.preference.strengths import PRIOR_SD
from mergesearch.merging import InputError


class Preference(EvaluatorBase):
    """Makes outputs for a person to judge.

    Args:
        maker: What makes them.
        name: Name of the objective.
        question: What the person is asked.
        choices: Pairs that a model is judged by, each on a prompt of its own.
        where: Key of the study file, for messages.

    Attributes:
        choices_each: The same.
    """

    constraints: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    _subject = "a person's choices"

    def __init__(self, maker: Maker, *, name: str, question: str, choices: int, where: str) -> None:
        self.objectives = (Objective(name, "maximize"),)
        self.model_class = maker.model_class
        self.choices_each = choices
        self._maker = maker
        self._name = name
        self._question = question
        self._where = where

    def check(self) -> None:
        """Check the prompts, of which every split needs one for each choice.

        Raises:
            InputError: In one line.
        """
        self._maker.check()
        for split in SPLITS:
            count = self._maker.count(split)
            if count < self.choices_each:
                raise InputError(
                    f"{self._where}.choices: expected at most {count}, the number of {split} "
                    f"prompts, received {self.choices_each}; add prompts, or ask for fewer choices"
                )

    def references(self) -> frozenset[str]:
        """The base, whose strength is 0."""
        return frozenset({"base"})

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings of what makes the outputs."""
        return self._maker.warnings(sources)

    def open(self) -> None:
        """Load the prompts."""
        self._maker.open()

    def halve_batch(self) -> int | None:
        """Halve the batch of what makes the outputs."""
        return self._maker.halve_batch()

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Make the outputs; value and error are what is believed before any choice."""
        outputs = self._maker.make(candidate, split, self.choices_each)
        exhibit = Exhibit(self._question, self.choices_each, tuple(outputs))
        return Measurement(
            {self._name: 0.0}, {self._name: PRIOR_SD}, exhibits={self._name: exhibit}
        )
