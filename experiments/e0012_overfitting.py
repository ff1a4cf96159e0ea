"""Experiment 12: what wins back the points that a search loses between its items and others?

``python -m experiments.e0012_overfitting [--seeds 8]``

Strategies search merges of the league's perceptrons (:mod:`experiments.league.perceptron`) with 400
search and 400 validation items; what wins is scored on 2,400 held-out items. Guards against
over-fitting search the same problems with the same seeds. Finished rows are kept in
``runs/overfitting``; the tables go into ``experiments/0012-overfitting/README.md``, between marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from experiments.league.network_merges import NetworkMerges
from experiments.league.networks import load_zoo
from experiments.league.perceptron import PerceptronArena
from experiments.league.play import GRADIENT_COST, build
from experiments.league.problems import Setup
from experiments.running import ROOT, interval, kept, run_in_pairs, write_between
from mergesearch.evaluators import Measurement, Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.fidelity.rules import Race, race_stages
from mergesearch.search.front import Normaliser, to_losses
from mergesearch.search.record.trial_record import Kind, Score, TrialRecord
from mergesearch.search.strategies.base import Suggestion, TrialResult
from mergesearch.search.study.posterior import posterior_losses
from mergesearch.search.study.selection import choose_leaders, choose_winner
from mergesearch.search.workers.gradient_steps import take_gradient_steps

Array = npt.NDArray[np.float64]

RUNS = ROOT / "runs" / "overfitting"
README = ROOT / "experiments" / "0012-overfitting" / "README.md"
STOP = "<!-- end of table -->"

OBJECTIVES = (Objective("accuracy 0", "maximize"),)
EXPERTS = 4
#: Items of each split before any are lent.
ITEMS = 400
#: Share of the validation items that is lent.
LENT = 0.8
LEADERS = 5
#: Parts of the way from the start to the recommendation that are nominated too.
SHRUNK = (0.75, 0.875)
#: How often a search is looked at.
LOOKS = 10


@dataclass(frozen=True)
class Setting:
    """What is searched, and how.

    Attributes:
        strategy: Its name.
        dim: Coefficients, of four experts.
        trials: Trials on all 400 search items that the budget pays for without a guard.
    """

    strategy: str
    dim: int
    trials: int

    @property
    def label(self) -> str:
        """For the table."""
        return f"`{self.strategy}`, {self.dim} / {self.trials}"


SETTINGS = (
    Setting("cma_es", 48, 300),
    Setting("cma_es", 48, 1000),
    Setting("quadratic", 48, 300),
    Setting("quadratic", 48, 1000),
    Setting("hybrid", 48, 300),
)

#: ``lent``: 320 of the validation items are search items; ``lent, late``: only in the second half
#: of the budget, with estimates by difference before; ``raced``: with ``fidelity: race``. All have
#: as many evaluations of items as ``none``, but for ``lent, as many trials``.
Guard = Literal["none", "raced", "lent", "lent, raced", "lent, late", "lent, as many trials"]
GUARDS: tuple[Guard, ...] = (
    "none",
    "raced",
    "lent",
    "lent, raced",
    "lent, late",
    "lent, as many trials",
)


@dataclass(frozen=True)
class Case:
    """A setting, a guard and a seed."""

    setting: Setting
    guard: Guard
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        one = self.setting
        guard = self.guard.replace(", ", "-").replace(" ", "-")
        return f"{one.strategy}-{one.dim}-{one.trials}-{guard}-{self.seed}"


class Searched:
    """A search on its items, with the validation items that are left.

    Args:
        case: Which.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        setting = case.setting
        lent = round(LENT * ITEMS) if case.guard.startswith("lent") else 0
        self.items = ITEMS + lent
        each = self.items if case.guard == "lent, as many trials" else ITEMS
        self.budget = setting.trials * each
        trials = self.budget // self.items
        # The first 400 items are the same whatever is lent.
        setup = Setup("perceptron", setting.dim, trials, items=self.items, seed=case.seed)
        zoo = load_zoo(EXPERTS, case.seed)
        self._merges = NetworkMerges(zoo, setting.dim // EXPERTS)
        self.arena = PerceptronArena(setup, zoo)
        self.problem = self.arena.problem
        rng = np.random.default_rng([case.seed, 1])
        count = len(zoo.data.digits["search"])
        part = slice(self.items // EXPERTS, 2 * ITEMS // EXPERTS)
        self._validation = [rng.permutation(count)[part] for _ in range(EXPERTS)]
        self.records: list[TrialRecord] = []

    def add(self, kind: Kind, point: Array) -> TrialRecord:
        """Measure a point on all search items."""
        result = self.arena.measure(point, len(self.records))
        return self.keep(kind, result)

    def keep(self, kind: Kind, result: TrialResult) -> TrialRecord:
        """The record of a whole result."""
        assert result.losses is not None
        assert result.errors is not None
        number = len(self.records)
        name = OBJECTIVES[0].name
        experts = tuple(Source(f"e{row}", f"e{row}") for row in range(len(result.point)))
        field = Field.constant(1, result.point)
        record = TrialRecord(
            number=number,
            kind=kind,
            name="",
            suggestion=number,
            point=result.point,
            merge=Recipe(Source("base", "base"), experts, "task_arithmetic", field, layout="none"),
            tells_at_ask=0,
            tell_index=number,
            state="complete",
            values={name: -float(result.losses[0])},
            errors={name: float(result.errors[0])},
            items=result.items,
        )
        self.records.append(record)
        return record

    def validate(self, point: Array) -> Score:
        """The score of a point on the validation items that are left."""
        right = self._merges.right(point, "search", self._validation)
        error = float(np.sqrt(np.sum(right.var(axis=1) / right.shape[1])) / EXPERTS)
        name = OBJECTIVES[0].name
        return Score({name: float(right.mean())}, {name: error}, {name: right.T.ravel()})

    def held_out(self, point: Array) -> float:
        """Accuracy on held-out items, in per cent."""
        return -100 * float(self.arena.true_losses(point)[0])


def run_case(case: Case) -> dict[str, Any]:
    """Search, look at recommendations on the way, and choose; kept once it is done."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    searched = Searched(case)
    for anchor in searched.problem.anchors:
        searched.keep("anchor", anchor)
    looks, point = _search(searched)
    searched.add("recommended", point)
    plain = _choose(searched, [])
    start = searched.problem.start
    shrunk = [searched.add("search", start + part * (point - start)).number for part in SHRUNK]
    return {"looks": looks, "winner": plain, "shrunk": _choose(searched, shrunk)}


def _search(searched: Searched) -> tuple[list[dict[str, float]], Array]:
    """Spend the budget; what was recommended at each look, and at the end."""
    case = searched.case
    strategy = build(case.setting.strategy, {}, searched.problem, case.seed)
    best = max(searched.records, key=lambda record: _value(record))
    looks: list[dict[str, float]] = []
    spent = 0
    while suggestions := strategy.ask(1):
        (asked,) = suggestions
        early = case.guard == "lent, late" and spent < searched.budget / 2
        if spent + _cost(searched, asked, ITEMS if early else searched.items) > searched.budget:
            break
        result = _measure(searched, asked)
        items = ITEMS if early else searched.items
        if case.guard.endswith("raced") and result.losses is not None:
            items = _raced(result, best)
        spent += _cost(searched, asked, items)
        if items < searched.items and result.losses is not None:
            result = _by_difference(result, best, items)
        elif result.losses is not None:
            record = searched.keep("search", result)
            best = max(best, record, key=_value)
        strategy.tell([replace(result, id=asked.id)])
        if spent >= (len(looks) + 1) * searched.budget / LOOKS and strategy.best():
            looks.append(_scores(searched, strategy.best()[0]))
    return looks, strategy.best()[0]


def _measure(searched: Searched, asked: Suggestion) -> TrialResult:
    """A suggestion's result, with that of its gradient steps."""
    arena = searched.arena
    result = (
        TrialResult(None, asked.point, None, evaluated=0)
        if asked.items == 0
        else arena.measure(asked.point, asked.id)
    )
    steps = asked.gradient_steps
    if steps is None:
        return result
    weights = dict(steps.config.weights)
    walked = take_gradient_steps(
        steps, asked.point, lambda at, batch: arena.loss_and_gradient(at, batch, weights)
    )
    return replace(result, gradient_result=walked)


def _cost(searched: Searched, asked: Suggestion, items: int) -> int:
    steps = asked.gradient_steps
    own = 0 if asked.items == 0 else items
    if steps is None:
        return own
    return own + GRADIENT_COST * steps.batches * searched.arena.batch_items(steps.config.batch)


def _raced(result: TrialResult, best: TrialRecord) -> int:
    """Items after which a race against the best trial stops, all of them if it does not."""
    name = OBJECTIVES[0].name
    scores = result.items[name]
    race = Race((), ({name: best.items[name]},), {name: -1.0}, confidence=1.0)
    for stage in race_stages(len(scores), 50):
        part = Measurement(
            {},
            items={name: scores[:stage]},
            weights={name: np.full(stage, 1 / stage)},
            item_indices={name: np.arange(stage)},
        )
        if race.stops(0, part):
            return stage
    return len(scores)


def _by_difference(result: TrialResult, best: TrialRecord, items: int) -> TrialResult:
    """What is known of a trial on the first items only, as early stopping estimates it."""
    name = OBJECTIVES[0].name
    gaps = result.items[name][:items] - best.items[name][:items]
    error = float(np.hypot(best.errors[name], gaps.std() / np.sqrt(items)))
    loss = np.array([-(best.values[name] + gaps.mean())])
    return replace(result, losses=loss, items={}, estimated=items, errors=np.array([error]))


def _value(record: TrialRecord) -> float:
    return record.values[OBJECTIVES[0].name]


def _scores(searched: Searched, point: Array) -> dict[str, float]:
    name = OBJECTIVES[0].name
    losses = searched.arena.measure(point, 0).losses
    assert losses is not None
    return {
        "search": -100 * float(losses[0]),
        "validation": 100 * searched.validate(point).values[name],
        "held out": searched.held_out(point),
    }


def _choose(searched: Searched, more: Sequence[int]) -> dict[str, float]:
    """Scores of the winner, as a study chooses it, with ``more`` nominees."""
    records = searched.records
    anchors = [record for record in records if record.kind == "anchor"]
    losses = np.array([to_losses(each.values, OBJECTIVES) for each in anchors])
    normaliser = Normaliser.from_anchors(losses)
    weights = np.ones(1)
    leaders = choose_leaders(records, OBJECTIVES, weights, normaliser, LEADERS, 1.0)
    leaders = list(dict.fromkeys([*leaders, *more]))
    validation = {
        number: searched.validate(_point(records[number]))
        for number in [*(record.number for record in anchors), *leaders]
    }
    width = searched.problem.width
    expected = posterior_losses(
        records, leaders, validation, OBJECTIVES, weights, normaliser, width
    )
    winner = choose_winner(validation, OBJECTIVES, weights, normaliser, expected)
    assert winner is not None
    return _scores(searched, _point(records[winner]))


def _point(record: TrialRecord) -> Array:
    assert record.point is not None
    return record.point


#: Guards whose recommendations on the way are shown.
STOPPED: tuple[Guard, ...] = ("none", "lent")

Results = Mapping[Case, Mapping[str, Any]]


def _winners(results: Results, setting: Setting, guard: Guard, kind: str) -> dict[int, Any]:
    """Seed -> scores of the winner."""
    return {
        case.seed: found[kind]
        for case, found in results.items()
        if case.setting == setting and case.guard == guard
    }


def guard_table(results: Results) -> str:
    """What every guard wins back, setting by setting, on the seeds that both have."""
    head = ["search", "guard", "seeds", "search items", "held out", "loss", "won back"]
    head += ["gain held out"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting in SETTINGS:
        plain = _winners(results, setting, "none", "winner")
        rows: list[tuple[str, Guard, str]] = [(guard, guard, "winner") for guard in GUARDS]
        rows.insert(1, ("shrunk nominees", "none", "shrunk"))
        for label, guard, kind in rows:
            ours = _winners(results, setting, guard, kind)
            seeds = sorted({*ours} & {*plain})
            if len(seeds) > 1:
                cells = _cells([ours[seed] for seed in seeds], [plain[seed] for seed in seeds])
                shown = cells if label != "none" else [*cells[:-2], "", ""]
                lines.append(f"| {setting.label} | {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cells(ours: Sequence[Any], plain: Sequence[Any]) -> list[str]:
    """A row: scores of winners, and their gain over those of the same seeds without a guard."""
    search, held = (np.array([each[key] for each in ours]) for key in ("search", "held out"))
    before, base = (np.array([each[key] for each in plain]) for key in ("search", "held out"))
    loss = float((search - held).mean())
    back = 1 - loss / float((before - base).mean())
    gain, half = interval(list(held - base))
    means = [f"{search.mean():.2f}", f"{held.mean():.2f}", f"{loss:.2f}"]
    return [str(len(ours)), *means, f"{back:.0%}", f"{gain:+.2f} ± {half:.2f}"]


def stop_table(results: Results) -> str:
    """Recommendations at every tenth of the budget, and what an early stop would have cost."""
    head = ["search", "guard", *(f"{10 * (look + 1)} %" for look in range(LOOKS)), "stopped at"]
    head += ["held out there, less the end"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting in SETTINGS:
        for guard in STOPPED:
            chosen = [
                r for case, r in results.items() if (case.setting, case.guard) == (setting, guard)
            ]
            paths = [
                [look["held out"] for look in each["looks"]]
                for each in chosen
                if len(each["looks"]) >= LOOKS - 1
            ]
            if not paths:
                continue
            count = min(len(path) for path in paths)
            means = np.mean([path[:count] for path in paths], axis=0)
            cells = [f"{mean:.1f}" for mean in means] + [""] * (LOOKS - count)
            stops = [stopped_at(each["looks"]) for each in chosen]
            shares = np.mean([(stop + 1) / LOOKS for stop in stops])
            costs = [
                each["looks"][stop]["held out"] - each["looks"][-1]["held out"]
                for each, stop in zip(chosen, stops, strict=True)
            ]
            mean, half = interval(costs)
            cells += [f"{shares:.0%}", f"{mean:+.2f} ± {half:.2f}"]
            lines.append(f"| {setting.label} | {guard} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stopped_at(looks: Sequence[Mapping[str, float]]) -> int:
    """The look at which a search stops: two in a row with no better validation score so far."""
    best = -np.inf
    since = 0
    for index, look in enumerate(looks):
        since = 0 if look["validation"] > best else since + 1
        best = max(best, look["validation"])
        if since == 2:
            return index
    return len(looks) - 1


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description="Compare guards against over-fitting.")
    parser.add_argument("--seeds", type=int, default=8, help="of each row (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="only of searches that are finished")
    options = parser.parse_args()
    cases = [
        Case(setting, guard, seed)
        for setting in SETTINGS
        for guard in GUARDS
        for seed in range(options.seeds)
    ]
    if options.table:
        cases = [case for case in cases if (RUNS / f"{case.name}.json").is_file()]
    results = run_in_pairs(cases, run_case)
    for name, text in (("guards", guard_table(results)), ("stops", stop_table(results))):
        write_between(README, f"<!-- table {name}: written by the command above -->", STOP, text)
        print(text)


if __name__ == "__main__":
    main()
