"""Experiment 10: which of the nominees should win?

``python -m experiments.e0010_final_choice [--searches 60]``

A strategy searches on problems of the league (:mod:`experiments.league.problems`); its
recommendation and five leaders are re-evaluated on validation items, as in every study, and a rule
chooses among them and the anchors. All rules choose in the same searches; compared is the true gap
of what they choose. Finished rows are kept in ``runs/choice``; the table goes into
``experiments/0010-final-choice/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.league.families import FAMILIES
from experiments.league.problems import MadeArena, Noise, Setup
from experiments.running import ROOT, kept, run_in_pairs, write_between
from mergesearch.evaluators import Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.front import Normaliser, to_losses
from mergesearch.search.record.trial_record import Kind, Score, TrialRecord
from mergesearch.search.strategies.base import TrialResult
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.search.study.posterior import posterior_losses
from mergesearch.search.study.selection import choose_leaders, choose_winner

Array = npt.NDArray[np.float64]

RUNS = ROOT / "runs" / "choice"
README = ROOT / "experiments" / "0010-final-choice" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"

LEADERS = 5
ALL = np.ones(1)
OBJECTIVES = (Objective("accuracy 0", "maximize"),)


@dataclass(frozen=True)
class Setting:
    """What is searched, and how.

    Attributes:
        strategy: Its name.
        family: Of the league's problems.
        dim: Coordinates.
        trials: Trials of the search.
        noise: ``items``: the same items for every merge; ``binomial``: new ones for each.
        spoilt: Recommend the mean of the first fifth of the trials instead.
    """

    strategy: str
    family: str
    dim: int
    trials: int
    noise: Noise = "items"
    spoilt: bool = False

    @property
    def label(self) -> str:
        """For the table."""
        spoilt = ", an early mean recommended" if self.spoilt else ""
        return f"`{self.strategy}`, {self.family} {self.dim} / {self.trials}, {self.noise}{spoilt}"


SETTINGS = (
    Setting("cma_es", "quadratic", 16, 300),
    Setting("quadratic", "quadratic", 16, 300),
    Setting("cma_es", "quadratic", 16, 300, "binomial"),
    Setting("quadratic", "quadratic", 16, 300, "binomial"),
    Setting("cma_es", "plateau", 16, 300),
    Setting("cma_es", "merge", 48, 300),
    Setting("cma_es", "quadratic", 16, 300, spoilt=True),
    Setting("sobol", "quadratic_easy", 4, 60),
)


@dataclass(frozen=True)
class Case:
    """A setting with its number of searches."""

    setting: Setting
    searches: int

    @property
    def name(self) -> str:
        """Name of its file."""
        one = self.setting
        kind = f"{one.noise}{'-spoilt' if one.spoilt else ''}"
        return f"{one.strategy}-{one.family}-{one.dim}-{one.trials}-{kind}"


class Answers:
    """Measures points on two sets of items, and makes records of them.

    Args:
        setting: Which problem.
        seed: Seeds the problem and its noise.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        setup = Setup(setting.family, setting.dim, setting.trials, noise=setting.noise, seed=seed)
        rng = np.random.default_rng([seed, setting.dim, 17])
        landscape = FAMILIES[setting.family](setting.dim, 1, rng)
        if setting.noise == "binomial":
            tasks = tuple(replace(task, pull=0.0) for task in landscape.tasks)
            landscape = replace(landscape, tasks=tasks)
        self.arena = MadeArena(setup, landscape)
        self._validation = MadeArena(replace(setup, seed=seed + 10**6), landscape)
        self.records: list[TrialRecord] = []

    def add(self, kind: Kind, point: Array) -> TrialRecord:
        """Measure a point on search items."""
        number = len(self.records)
        result = self.arena.measure(point, number)
        experts = tuple(Source(f"e{row}", f"e{row}") for row in range(len(point)))
        base = Source("base", "base")
        field = Field.constant(1, point)
        score = _score(result)
        record = TrialRecord(
            number=number,
            kind=kind,
            name="",
            suggestion=number,
            point=point,
            merge=Recipe(base, experts, "task_arithmetic", field, layout="none"),
            tells_at_ask=0,
            tell_index=number,
            state="complete",
            values=score.values,
            errors=score.errors,
            items=score.items,
        )
        self.records.append(record)
        return record

    def validate(self, number: int) -> Score:
        """The score of a trial on validation items."""
        return _score(self._validation.measure(self._point(number), number))

    def gap(self, number: int) -> float:
        """True gap of a trial: 0 at the optimum, 1 at the start."""
        return self.arena.gap(self._point(number))

    def _point(self, number: int) -> Array:
        point = self.records[number].point
        assert point is not None
        return point


def _score(result: TrialResult) -> Score:
    """A result as a record has it."""
    assert result.losses is not None
    assert result.errors is not None
    name = OBJECTIVES[0].name
    return Score({name: -float(result.losses[0])}, {name: float(result.errors[0])}, result.items)


def search(setting: Setting, seed: int) -> Answers:
    """Anchors, trials and the recommendation of one search."""
    answers = Answers(setting, seed)
    told = answers.arena.problem
    for anchor in told.anchors:
        answers.add("anchor", anchor.point)
    options = check_options(setting.strategy, {})
    strategy = build_strategy(setting.strategy, options, told, seed)
    for _ in range(setting.trials):
        (asked,) = strategy.ask(1)
        record = answers.add("search", asked.point)
        strategy.tell([_told(record, asked.id)])
    if setting.spoilt:
        early = answers.records[len(told.anchors) :][: setting.trials // 5]
        points = [record.point for record in early if record.point is not None]
        answers.add("recommended", np.mean(points, axis=0))
    elif strategy.recommends and strategy.best():
        answers.add("recommended", strategy.best()[0])
    return answers


def _told(record: TrialRecord, number: int) -> TrialResult:
    assert record.point is not None
    errors = np.array([*record.errors.values()])
    losses = to_losses(record.values, OBJECTIVES)
    return TrialResult(number, record.point, losses, dict(record.items), errors=errors)


#: What a rule sees: the search, the leaders, validation scores, and the scale of losses.
Rule = Callable[[Answers, Sequence[int], Mapping[int, Score], Normaliser], Mapping[int, float]]


def _by_validation(
    answers: Answers,
    leaders: Sequence[int],
    validation: Mapping[int, Score],
    normaliser: Normaliser,
) -> Mapping[int, float]:
    return {number: -validation[number].values[OBJECTIVES[0].name] for number in leaders}


def _by_order(
    answers: Answers,
    leaders: Sequence[int],
    validation: Mapping[int, Score],
    normaliser: Normaliser,
) -> Mapping[int, float]:
    return {number: float(place) for place, number in enumerate(leaders)}


def _by_posterior(
    answers: Answers,
    leaders: Sequence[int],
    validation: Mapping[int, Score],
    normaliser: Normaliser,
) -> Mapping[int, float]:
    expected = posterior_losses(
        answers.records,
        leaders,
        validation,
        OBJECTIVES,
        ALL,
        normaliser,
        answers.arena.problem.width,
    )
    assert expected is not None
    return expected


RULES: Mapping[str, Rule] = {
    "validation": _by_validation,
    "recommendation": _by_order,
    "posterior": _by_posterior,
}


def run_case(case: Case) -> dict[str, Any]:
    """Search, and choose by every rule; kept once it is done."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return kept(
        RUNS / f"{case.name}.json",
        lambda: {"searches": [run_one(case.setting, seed) for seed in range(case.searches)]},
    )


def run_one(setting: Setting, seed: int) -> dict[str, float]:
    """True gap of what every rule chooses, in hundredths of the start's."""
    answers = search(setting, seed)
    anchors = [record for record in answers.records if record.kind == "anchor"]
    losses = np.array([to_losses(each.values, OBJECTIVES) for each in anchors])
    normaliser = Normaliser.from_anchors(losses)
    leaders = choose_leaders(answers.records, OBJECTIVES, ALL, normaliser, LEADERS, 1.0)
    numbers = [*(record.number for record in anchors), *leaders]
    validation = {number: answers.validate(number) for number in numbers}
    gaps = {number: 100 * answers.gap(number) for number in numbers}
    found = {"best nominee": min(gaps.values())}
    for name, rule in RULES.items():
        order = rule(answers, leaders, validation, normaliser)
        winner = choose_winner(validation, OBJECTIVES, ALL, normaliser, order)
        assert winner is not None
        found[name] = gaps[winner]
    return found


def table(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Mean gaps that every rule leaves, and the posterior's against validation alone."""
    head = ["search", "best nominee", *RULES, "posterior less validation", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting in SETTINGS:
        rows = [each for case in results if case.setting == setting for each in [results[case]]]
        if not rows:
            continue
        searches = rows[0]["searches"]
        left = {name: np.array([each[name] for each in searches]) for name in searches[0]}
        gap = left["posterior"] - left["validation"]
        floor = np.maximum(left["posterior"], 0.1) / np.maximum(left["validation"], 0.1)
        means = [f"{left[name].mean():.2f}" for name in ("best nominee", *RULES)]
        half = 1.96 * gap.std() / np.sqrt(len(gap))
        ratio = float(np.exp(np.log(floor).mean()))
        cells = [setting.label, *means, f"{gap.mean():+.2f} ± {half:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description="Compare rules that choose the winner.")
    parser.add_argument(
        "--searches", type=int, default=60, help="searches of each row (default: %(default)s)"
    )
    options = parser.parse_args()
    cases = [Case(setting, options.searches) for setting in SETTINGS]
    text = table(run_in_pairs(cases, run_case))
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
