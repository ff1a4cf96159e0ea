"""How many choices a study asks of the people who judge its models."""

from __future__ import annotations

from dataclasses import dataclass

from mergesearch.search.grammar import counted
from mergesearch.search.plan.plan import Plan, trials_of


@dataclass(frozen=True)
class ChoicesNeeded:
    """Choices at most: equal outputs, and pairs that were judged before, need none.

    Attributes:
        objective: What is judged.
        each: For each model, on each split; the base needs none.
        trials: Models of the search and anchors; None where the budget is a time.
        validation: Anchors and leaders.
        test: Anchors and the winner.
    """

    objective: str
    each: int
    trials: int | None
    validation: int
    test: int

    def line(self) -> str:
        """For people."""
        held_out = (self.validation + self.test) * self.each
        if self.trials is None:
            searched = "the time of the budget leaves out the time that choices take"
        else:
            searched = f"{counted(self.trials, 'trial')} need {self.trials * self.each:,}"
        return (
            f"{self.objective}: about {counted(self.each, 'choice')} a trial; {searched}, the "
            f"choice of the winner up to {held_out:,} more"
        )


def choices_needed(plan: Plan) -> list[ChoicesNeeded]:
    """What each objective that people judge asks of them; none where they judge nothing."""
    trials = trials_of(plan.spec, plan.evaluator)
    anchors = len([anchor for anchor in plan.anchors if anchor.name != "base"])
    base = len(plan.anchors) - anchors
    leaders = plan.spec.selection.leaders + plan.recommended_trials
    if trials is not None:
        leaders = min(leaders, max(trials - len(plan.anchors), 0))
    return [
        ChoicesNeeded(
            evaluator.name,
            evaluator.choices,
            None if trials is None else trials - base,
            anchors + leaders,
            anchors + 1,
        )
        for evaluator in plan.spec.evaluators
        if evaluator.kind == "preference"
    ]
