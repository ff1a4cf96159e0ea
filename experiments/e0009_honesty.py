"""Experiment 9: how often a study claims a gain that is none, and how often its intervals hold.

``python -m experiments.e0009_honesty [--studies 500]``

Every row is a number of real studies: anchors, search, choice of the winner and report, on merges
whose true scores are known (:mod:`experiments.item_problem`). Only weights are missing, and the log
is kept in memory. Half of the studies have nothing to find: every merge is equally good, and any
gain that is claimed is false. In the others the search can gain up to 20 points, and the true
improvement over every anchor is known. Finished blocks of studies are kept in ``runs/honesty``; the
table goes into ``experiments/0009-honesty/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.item_problem import RIVALS, ItemProblem, Local, anchors_of, with_items
from experiments.running import ROOT, folder_name, kept, run_in_pairs, write_between
from mergesearch.evaluators import Split
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import Verdict
from mergesearch.search.report.comparison import compare
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.report.simultaneous import critical_value, paired_deviation
from mergesearch.search.runs.wiring import open_log
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.problem import study_normaliser
from mergesearch.search.study.selection import choose_winner
from mergesearch.search.study.study import Study

Array = npt.NDArray[np.float64]

RUNS = ROOT / "runs" / "honesty"
README = ROOT / "experiments" / "0009-honesty" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"

DIM = 6
TRIALS = 60
ITEMS: dict[Split, int] = {"search": 200, "validation": 200, "test": 300}
#: The same with four fifths of the validation items lent to the search.
LENT: dict[Split, int] = {"search": 360, "validation": 40, "test": 300}
#: Studies that are run and kept together.
BLOCK = 50

#: Label -> number of objectives and the study's sections. The start is the only anchor of those
#: without rivals: with several anchors a gain is hardly ever claimed by chance.
KINDS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "one objective": (1, {}),
    "one anchor": (1, {}),
    "two objectives": (2, {}),
    "race": (1, {"fidelity": {"rule": "race", "min_items": 40}}),
    "subset": (1, {"fidelity": {"rule": "subset", "min_items": 80}}),
    "one objective, items lent": (1, {}),
    "one anchor, items lent": (1, {}),
}


COLUMNS = (
    "studies",
    "false gains without effect, %",
    "with one, %",
    "all intervals hold, %",
    "pointwise interval holds for the truly best anchor, %",
    "gain claimed, %",
    "winner better than the best by validation alone, points",
)


@dataclass(frozen=True)
class Case:
    """A block of studies."""

    kind: str
    effect: bool
    block: int
    studies: int = BLOCK

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{folder_name(self.kind)}-{'effect' if self.effect else 'none'}-{self.block}"


def run_case(case: Case) -> dict[str, Any]:
    """Run a block of studies, or read it if it is finished."""
    first = case.block * BLOCK
    return kept(
        RUNS / f"{case.name}.json",
        lambda: {
            "studies": [
                run_one(case.kind, seed, effect=case.effect)
                for seed in range(first, first + case.studies)
            ]
        },
    )


def run_one(kind: str, seed: int, *, effect: bool) -> dict[str, Any]:
    """Run a study; what it claims, and what is true."""
    objectives, sections = KINDS[kind]
    items = LENT if kind.endswith("items lent") else ITEMS
    problem = ItemProblem(DIM, seed, dict(items), effect=effect)
    rivals = 0 if kind.startswith("one anchor") else RIVALS
    plan = _plan(problem, objectives, rivals, seed, sections)
    log = _log(plan)
    verdict = Study(plan, log, Local(plan.evaluator)).run()  # type: ignore[arg-type]
    return _figures(_report(plan, log, verdict), problem, _luckiest(plan, log, verdict))


def _plan(
    problem: ItemProblem, objectives: int, count: int, seed: int, sections: dict[str, Any]
) -> Plan:
    """The plan of an analytic study, with this evaluator and several anchors in its place."""
    study = {
        "name": "honesty",
        "seed": seed,
        "space": {"dim": problem.dim, "bounds": [0.0, 1.0], "start": 0.3},
        "strategy": {"name": "cma_es" if objectives == 1 else "nsga2"},
        "evaluators": [
            {
                "kind": "synthetic",
                "problem": "quadratic_tasks",
                "objectives": objectives,
                "items": problem.items["search"],
            }
        ],
        "budget": {"trials": TRIALS},
        "selection": {"repeats": 0},
    }
    plan = plan_study(resolve(validate(study | sections, "study.yaml"), Path()))
    return with_items(plan, problem, objectives, count)


def _log(plan: Plan) -> TrialLog:
    from optuna.storages import InMemoryStorage

    return open_log(InMemoryStorage(), plan)


def _report(plan: Plan, log: TrialLog, verdict: Verdict) -> ReportData:
    return ReportData(
        study=plan.spec.name,
        run="runs/honesty",
        objectives=plan.objectives,
        weights=plan.weights.tolist(),
        records=log.records,
        verdict=verdict,
        scale=study_normaliser(plan, log.records),
        items={number: score.items for number, score in verdict.scores["test"].items()},
    )


def _luckiest(plan: Plan, log: TrialLog, verdict: Verdict) -> int:
    """The trial that would have won by its validation scores alone."""
    winner = choose_winner(
        verdict.scores["validation"],
        plan.objectives,
        plan.weights,
        study_normaliser(plan, log.records),
    )
    assert winner is not None
    return winner


def _figures(data: ReportData, problem: ItemProblem, luckiest: int) -> dict[str, Any]:
    """What the report says of every objective, beside the truth."""
    assert data.winner is not None
    truths = {record.number: _improvements(data, problem, record.number) for record in data.anchors}
    intervals = anchor_intervals(data)
    won = data.winner.number
    others = [each for number, each in truths.items() if number != won]
    true_gain = {
        o.name: min((each[o.name] for each in others), default=0.0) for o in data.objectives
    }
    claimed = [gain.objective for gain in gains(data, intervals) if gain.claimed]
    truly_best = min(truths, key=lambda number: _loss(data, problem, number))
    return {
        "claimed": claimed,
        "false": [name for name in claimed if true_gain[name] <= 1e-9],
        "covered": all(
            each.low <= truths[each.trial][each.objective] <= each.high
            for each in intervals
            if each.low is not None and each.high is not None
        ),
        "pointwise": all(
            each.low <= truth <= each.high
            for each in compare(data)
            if each.low is not None and each.high is not None
            for truth in [truths[truly_best][each.objective]]
            if data.winner is not data.best_anchor
        ),
        "anchor": data.winner.kind == "anchor",
        "truth": _loss(data, problem, data.winner.number),
        "luckiest": _loss(data, problem, luckiest),
    }


def _improvements(data: ReportData, problem: ItemProblem, number: int) -> dict[str, float]:
    """Objective -> how much better the winner truly is than an anchor."""
    assert data.winner is not None
    gaps = _truth(data, problem, data.winner.number) - _truth(data, problem, number)
    signs = {"maximize": 1.0, "minimize": -1.0}
    pairs = zip(data.objectives, gaps, strict=False)
    return {o.name: float(signs[o.direction] * gap) for o, gap in pairs}


def _truth(data: ReportData, problem: ItemProblem, number: int) -> Array:
    (record,) = [record for record in data.complete_records if record.number == number]
    return problem.truth(record.recipe.field.values.ravel())


def _loss(data: ReportData, problem: ItemProblem, number: int) -> float:
    """True mean loss of a trial over the objectives, in points."""
    accuracy, loss = _truth(data, problem, number)
    return 100 * float(np.mean([1 - accuracy, loss][: len(data.objectives)]))


def table(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """False gains, coverage and claims of every kind, with 95 % intervals."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for kind in KINDS:
        none, some = (_studies(results, kind, effect=effect) for effect in (False, True))
        if not none or not some:
            continue
        single = KINDS[kind][0] == 1  # with several objectives, no anchor is the best
        cells = [
            f"{kind}, {_counts(none, some)}",
            share([bool(each["false"]) for each in none]),
            share([bool(each["false"]) for each in some]),
            share([each["covered"] for each in some]),
            share([each["pointwise"] for each in some]) if single else "–",
            share([bool(each["claimed"]) for each in some]),
            _lift(some) if single else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(none: Sequence[Any], some: Sequence[Any]) -> str:
    """How many studies were without an effect, and with one."""
    return f"2 x {len(some)}" if len(none) == len(some) else f"{len(none)} + {len(some)}"


def _lift(studies: Sequence[Mapping[str, Any]]) -> str:
    """How much better winners truly are than those by validation scores alone, in points."""
    lifts = np.array([each["luckiest"] - each["truth"] for each in studies])
    return f"{lifts.mean():+.2f} ± {1.96 * lifts.std() / np.sqrt(len(lifts)):.2f}"


def fixed_winner(draws: int, first: int = 20_000) -> str:
    """How often all intervals hold around one merge, on so many draws of problem and test items."""
    held = [_holds(ItemProblem(DIM, seed, dict(ITEMS))) for seed in range(first, first + draws)]
    return f"The same intervals around a fixed merge, {draws} draws: all hold in {share(held)} %."


def _holds(problem: ItemProblem) -> bool:
    """Whether the intervals of a merge near the optimum hold against all anchors."""
    winner = problem.start + 0.85 * (problem.optima[0] - problem.start)
    gaps = [_gap(problem, winner, anchor) for anchor in anchors_of(problem)]
    deviations = [paired_deviation(gap) for gap, _ in gaps]
    width = critical_value(deviations)
    return all(
        abs(gap.mean() - truth) <= width * deviation.error
        for (gap, truth), deviation in zip(gaps, deviations, strict=True)
    )


def _gap(problem: ItemProblem, winner: Array, anchor: Array) -> tuple[Array, float]:
    """Differences on the test items ``(items,)``, and the true one."""
    items = problem.scores(winner, "test")[0] - problem.scores(anchor, "test")[0]
    return items, float(problem.truth(winner)[0] - problem.truth(anchor)[0])


def _studies(
    results: Mapping[Case, Mapping[str, Any]], kind: str, *, effect: bool
) -> list[Mapping[str, Any]]:
    blocks = [r for case, r in results.items() if (case.kind, case.effect) == (kind, effect)]
    return [study for block in blocks for study in block["studies"]]


def share(hits: Sequence[bool]) -> str:
    """A share in percent with its 95 % interval (Wilson 1927)."""
    count = len(hits)
    rate = sum(hits) / count
    middle = (rate + 1.92 / count) / (1 + 3.84 / count)
    half = 1.96 * np.sqrt(rate * (1 - rate) / count + 0.96 / count**2) / (1 + 3.84 / count)
    return f"{100 * rate:.1f} ({100 * max(middle - half, 0.0):.1f} to {100 * (middle + half):.1f})"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description="Check what reports claim against what is true.")
    parser.add_argument(
        "--studies", type=int, default=500, help="studies of each half (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=int, default=3000, help="draws around a fixed merge (default: %(default)s)"
    )
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(kind, effect, block)
        for kind in options.kinds
        for effect in (False, True)
        for block in range(options.studies // BLOCK)
    ]
    text = table(run_in_pairs(cases, run_case))
    fixed = RUNS / f"fixed-{options.draws}.json"
    text += f"\n\n{kept(fixed, lambda: {'told': fixed_winner(options.draws)})['told']}"
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
