"""Several evaluators as one: their objectives side by side."""

from __future__ import annotations

from collections.abc import Sequence

from evaluators.base import Candidate, Evaluator, Measurement, Split
from merging import InputError


class Composite:
    """Runs evaluators one after the other on the same candidate.

    It provides what all of them provide, except gradients: those of different evaluators have no common meaning.

    Raises:
        InputError: If two objectives have the same name, or two evaluators need different model classes.
    """

    def __init__(self, members: Sequence[Evaluator], where: str = "evaluators") -> None:
        self._members = tuple(members)
        self.objectives = tuple(objective for member in members for objective in member.objectives)
        names = [objective.name for objective in self.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{where}: expected unique names of objectives, received {twice} twice; give one a name")
        classes = sorted({member.model_class for member in members if member.model_class is not None})
        if len(classes) > 1:
            raise InputError(f"{where}: expected evaluators of one kind of model, received {classes}; use two studies")
        self.model_class: str | None = classes[0] if classes else None
        self.provides = frozenset.intersection(*(member.provides for member in members)) - {"gradient"}

    def check(self) -> None:
        """Check every member."""
        for member in self._members:
            member.check()

    def open(self) -> None:
        """Open every member."""
        for member in self._members:
            member.open()

    def size(self, split: Split) -> int:
        """Items of the member that has most."""
        return max(member.size(split) for member in self._members)

    def cost(self, split: Split, items: int | None = None) -> int:
        """What all members evaluate."""
        return sum(member.cost(split, items) for member in self._members)

    def evaluate(self, candidate: Candidate, split: Split, items: int | None = None) -> Measurement:
        """Measurements of all members, side by side; each scores its own first ``items``."""
        parts = [member.evaluate(candidate, split, items) for member in self._members]
        return Measurement(
            values={name: value for part in parts for name, value in part.values.items()},
            errors={name: value for part in parts for name, value in part.errors.items()},
            items={name: scores for part in parts for name, scores in part.items.items()},
        )
