"""Experiment 13: AdaMerging against task arithmetic on a tiny CLIP with class prompts.

``python -m experiments.e0013_clip [--seeds 5] [--steps 300]``

As in Yang 2024 (arXiv 2310.02575): vision towers are merged tensor by tensor (the paper's "layer")
from coefficients of 0.3, Adam follows the entropy of the answers with learning rate 1e-3 (and, in
a row of its own, 1e-2), 16 items of every task at each step. Search items are the test items
without labels (transductive) or other ones. Finished studies are kept in ``runs/clip``; the table
goes into ``experiments/0013-clip/README.md``, between its marks.

Beside it stand the methods that run the experts on items (Fisher, RegMean, Concrete) and those that
merge for each input (T3, Twin-Merging), with the same prompts, on search items, with the settings
of :data:`CALIBRATED` and :data:`ROUTED` and nothing searched.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.running import ROOT, kept, mean_and_half, write_between
from experiments.zoo.calibration import clip_calibration
from experiments.zoo.clip import section
from experiments.zoo.clip_data import CLASSES

RUNS = ROOT / "runs" / "clip"
ZOO = ROOT / "zoo" / "clip"
README = ROOT / "experiments" / "0013-clip" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"
#: Learning rate of the paper.
RATE = 1e-3
#: What is searched on, and how fast.
ROWS = ((True, RATE), (True, 10 * RATE), (False, RATE))
#: Gradient steps of a trial.
STEPS_EACH = 50
#: Coefficients of task arithmetic in the table: AdaMerging's start, and a line.
LINE = (0.3, *(round(0.1 * step, 1) for step in range(1, 11)))
#: Operators that run the experts on items, with options; all others have their defaults.
CALIBRATED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("fisher", {}),
    ("regmean", {}),
    ("concrete", {"steps": 300}),
    ("concrete", {"steps": 300, "learning_rate": 1e-2}),
)
#: Merges for each input, of base and each expert or of all experts, with parameters at their start.
ROUTED = (*(("t3", (task,)) for task in CLASSES), ("twin_merging", tuple(CLASSES)))

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """A study of AdaMerging.

    Attributes:
        granularity: ``tensor`` or ``task``.
        transductive: Search on the test items.
        seed: Of the order of the items.
        steps: Steps in total.
        rate: Learning rate of Adam.
    """

    granularity: str
    transductive: bool
    seed: int
    steps: int
    rate: float = RATE

    @property
    def label(self) -> str:
        """Its row in the table."""
        items = "test items" if self.transductive else "search items"
        layer = "layer-wise" if self.granularity == "tensor" else "task-wise"
        faster = "" if self.rate == RATE else f", learning rate {self.rate:g}"
        return f"AdaMerging, {layer}, {items}{faster}"

    @property
    def name(self) -> str:
        """Name of its run folder."""
        items = "test" if self.transductive else "search"
        faster = "" if self.rate == RATE else f"-{self.rate:g}"
        return f"{self.granularity}-{items}-{self.seed}-{self.steps}{faster}"

    def study(self) -> dict[str, Any]:
        """The study file: every trial walks on from the one before."""
        trials = self.steps // STEPS_EACH
        strategy: dict[str, Any] = {
            "name": "adamerging",
            "steps": STEPS_EACH,
            "restarts_in_parallel": 1,
        }
        strategy["learning_rate"] = self.rate
        return {
            "name": self.name,
            "seed": self.seed,
            "base": str(ZOO / "base"),
            "experts": {task: str(ZOO / task) for task in CLASSES},
            "evaluators": [section(ZOO, "entropy", transductive=self.transductive)],
            "space": {"granularity": self.granularity},
            "strategy": strategy,
            "budget": {"trials": trials + 1},
            "anchors": "none",
            "selection": {"leaders": 1},
        }


def run_case(case: Case) -> dict[str, Any]:
    """Test accuracies of what a study recommends, or those that are kept."""

    def searched() -> dict[str, Any]:
        from mergesearch.search.runs.driver import run_study

        run = run_study(_resolved(case.study()), RUNS / case.name)
        (chosen,) = (record for record in run.log.records if record.kind == "recommended")
        return {"accuracy": accuracies(chosen.recipe)}

    return kept(RUNS / f"{case.name}.json", searched)


def line() -> dict[str, Figures]:
    """Test accuracies of base, experts, and task arithmetic along a line."""
    from mergesearch.merging import Field
    from mergesearch.search.plan.planning import plan_study

    def measured() -> dict[str, Any]:
        plan = plan_study(_resolved(Case("task", False, 0, STEPS_EACH).study()))
        assert plan.layout is not None
        size = plan.layout.size
        count = len(CLASSES)
        rows = {"base": np.zeros(count)}
        rows |= {f"expert {t}": row for t, row in zip(CLASSES, np.eye(count), strict=True)}
        rows |= {f"task arithmetic {c:.1f}": np.full(count, c) for c in LINE}
        return {
            name: accuracies(plan.template.with_field(Field.constant(size, row)))
            for name, row in rows.items()
        }

    return kept(RUNS / "line.json", measured)


def calibrated(operator: str, own: Mapping[str, Any]) -> dict[str, Figures]:
    """Test accuracies of an operator that runs the experts, at its default coefficient."""
    from mergesearch.merging import Field
    from mergesearch.merging.operators import get_operator
    from mergesearch.search.plan.planning import plan_study

    given = clip_calibration(ZOO, ZOO)

    settings = [f"{key} {value:g}" for key, value in own.items()]

    def measured() -> dict[str, Any]:
        options = {"name": operator, "calibration": given, **own}
        study = Case("task", False, 0, STEPS_EACH).study() | {"operator": options}
        plan = plan_study(_resolved(study | {"strategy": "cma_es"}))
        template = plan.template
        coefficient = get_operator(operator).default(len(CLASSES), template.options)
        row = np.full(len(CLASSES), coefficient)
        field = Field.constant(template.field.size, row)
        label = ", ".join([f"{operator} {coefficient:g}", *settings]).replace("_", " ")
        return {label: accuracies(template.with_field(field))}

    return kept(RUNS / f"{'-'.join([operator, *settings]).replace(' ', '-')}.json", measured)


def routed(kind: str, experts: Sequence[str]) -> dict[str, Figures]:
    """Test accuracies of a merge for each input."""
    from mergesearch.search.plan.planning import plan_study

    options = {"kind": kind, "input": "image"}
    label = f"T3, base and expert {experts[0]}" if kind == "t3" else "Twin-Merging"

    def measured() -> dict[str, Any]:
        study = Case("task", False, 0, STEPS_EACH).study() | {
            "experts": {task: str(ZOO / task) for task in experts},
            "evaluators": [section(ZOO, "accuracy") | options],
            "strategy": "cma_es",
        }
        del study["space"]
        plan = plan_study(_resolved(study))
        return {label: accuracies(plan.space.decode(plan.space.start), **options)}

    return kept(RUNS / f"{kind}-{'-'.join(experts)}.json", measured)


def accuracies(recipe: Any, **options: Any) -> dict[str, float]:
    """Test accuracy of a merge by task, by a worker that has seen nothing of the study.

    Args:
        recipe: The merge.
        **options: Keys of the evaluator's section beside those of the zoo.
    """
    from mergesearch.search.workers.messages import Task, WorkerSpec
    from mergesearch.search.workers.worker import Worker

    objectives = [{"name": task, "metric": "accuracy", "domains": [task]} for task in CLASSES]
    evaluators = _resolved(
        Case("task", False, 0, STEPS_EACH).study()
        | {"evaluators": [section(ZOO) | options | {"objectives": objectives}]}
    ).evaluators
    spec = WorkerSpec(recipe, tuple(e.model_dump() for e in evaluators), str(RUNS / ".arenas"))
    outcome = Worker(spec).run(Task("", recipe, "test"))
    assert outcome.measurement is not None, outcome.failure
    return {task: float(outcome.measurement.values[task]) for task in CLASSES}


def _resolved(study: Mapping[str, Any]) -> Any:
    from mergesearch.search.spec.study_file import resolve, validate

    return resolve(validate(dict(study), str(study["name"])), ROOT)


def table(
    known: Mapping[str, Figures],
    searched: Mapping[str, Sequence[Figures]],
    others: Mapping[str, Figures],
) -> str:
    """A row for each merge: accuracy by task, and the mean."""
    best = max(
        (name for name in known if name.startswith("task arithmetic")),
        key=lambda name: float(np.mean([*known[name].values()])),
    )
    single = {name: [row] for name, row in known.items() if not name.startswith("task")}
    single["task arithmetic 0.3"] = [known["task arithmetic 0.3"]]
    single[f"best on test items of the line: {best}"] = [known[best]]
    lines = [
        f"| merge | {' | '.join(CLASSES)} | mean |",
        f"|---|{'---|' * (len(CLASSES) + 1)}",
    ]
    alone = {name: [row] for name, row in others.items()}
    for name, rows in {**single, **searched, **alone}.items():
        columns = [[100 * row[task] for row in rows] for task in CLASSES]
        columns.append([100 * float(np.mean([*row.values()])) for row in rows])
        lines.append(f"| {name} | {' | '.join(map(mean_and_half, columns))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=300, help="gradient steps of a study (default: %(default)s)"
    )
    parser.add_argument(
        "--granularity",
        choices=["tensor", "task"],
        default="tensor",
        help="tensor is the layer-wise variant (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    known = line()
    searched: dict[str, list[Figures]] = {}
    for transductive, rate in ROWS:
        for seed in range(options.seeds):
            case = Case(options.granularity, transductive, seed, options.steps, rate)
            searched.setdefault(case.label, []).append(run_case(case)["accuracy"])
            print(case.name, flush=True)
    others: dict[str, Figures] = {}
    for operator, own in CALIBRATED:
        others |= calibrated(operator, own)
        print(operator, flush=True)
    for kind, experts in ROUTED:
        others |= routed(kind, experts)
        print(kind, *experts, flush=True)
    text = table(known, searched, others)
    print(text)
    write_between(README, START, STOP, text)


if __name__ == "__main__":
    main()
