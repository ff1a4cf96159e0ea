"""Experiment 20: bits of each layer, by two measures of importance and by search.

``python -m experiments.e0020_bits``

Half of the layers of a vision transformer get 4 bits and the others 2, so 3 in the mean: those that
a measure names, and all choices there are, of which the best on search items is what an exhaustive
search finds. A study searches bits from 2 to 8 within the same mean, alone and with coefficients.
Beside it, what blocks contribute as a prior of coefficients over depth. Figures are of test items.
Finished studies are kept in ``runs/bits``; the tables go into ``experiments/0020-bits/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.running import ROOT, kept, write_between
from mergesearch.merging import Field, Recipe
from mergesearch.merging.models.layer_bits import BitLayer, bit_layers

RUNS = ROOT / "runs" / "bits"
ZOO = ROOT / "zoo" / "digits"
README = ROOT / "experiments" / "0020-bits" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
DOMAINS = ("upright", "rotated", "mirrored", "inverted")
CALIBRATION = {
    "data": str(ZOO / "data"),
    "split": "search",
    "model_class": "AutoModelForImageClassification",
    "inputs": {"pixel_values": "pixels"},
    "samples": 128,
}
#: Trials of a study of bits.
TRIALS = 70

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """A model that is rounded.

    Attributes:
        name: As the table shows it.
        experts: What it is merged from, by task arithmetic.
        coefficient: Of each.
        domains: What it is scored on.
    """

    name: str
    experts: tuple[str, ...]
    coefficient: float
    domains: tuple[str, ...]


SUBJECTS = (
    Subject("average of four", DOMAINS, 0.25, DOMAINS),
    *(Subject(f"expert {name}", (name,), 1.0, (name,)) for name in DOMAINS),
)


def study_of(subject: Subject, bits: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The study of a subject's bits."""
    return {
        "name": subject.name.replace(" ", "-"),
        "seed": seed,
        "base": str(ZOO / "base"),
        "experts": {name: str(ZOO / name) for name in subject.experts},
        "operator": "task_arithmetic",
        "space": {"granularity": "task", "start": subject.coefficient, "bits": dict(bits)},
        "strategy": "cma_es",
        "evaluators": [
            {
                "kind": "classification",
                "data": str(ZOO / "data"),
                "domain": "domain",
                "id": "id",
                "objectives": [
                    {"name": "accuracy", "metric": "accuracy", "domains": [*subject.domains]}
                ],
            }
        ],
        "budget": {"trials": TRIALS},
        "anchors": "none",
        "selection": {"leaders": 4},
    }


class Bench:
    """Scores recipes of one subject on the splits of the zoo."""

    def __init__(self, subject: Subject) -> None:
        """Plan the subject's study, and open a worker for it."""
        from mergesearch.search.plan.planning import plan_study
        from mergesearch.search.spec.study_file import resolve, validate
        from mergesearch.search.workers.messages import WorkerSpec
        from mergesearch.search.workers.worker import Worker

        data = study_of(subject, {"mean": 3.0, "only": True})
        self.plan = plan_study(resolve(validate(data, subject.name), ROOT))
        evaluators = tuple(one.model_dump(mode="json") for one in self.plan.spec.evaluators)
        arenas = str(RUNS / "arenas" / subject.name.replace(" ", "-"))
        self._worker = Worker(WorkerSpec(self.plan.template, evaluators, arenas))
        start = self.plan.space.decode(self.plan.space.start)
        self.recipe = replace(start, bits=())
        assert self.plan.layout is not None
        self.layers = bit_layers(self.plan.layout)

    def score(self, recipe: Recipe, split: str) -> float:
        """Accuracy of a recipe on a split."""
        from mergesearch.search.workers.messages import Task

        outcome = self._worker.run(Task("one", recipe, split))  # type: ignore[arg-type]
        assert outcome.measurement is not None, outcome.failure
        return 100 * outcome.measurement.values["accuracy"]

    def rounded(self, widths: Sequence[int]) -> Recipe:
        """The subject with these bits of its layers."""
        return replace(self.recipe, bits=bits_of(self.layers, widths))

    def importance(self, calibration: Mapping[str, Any] | None) -> Floats:
        """LIM with items, ZD without."""
        from mergesearch.merging.family.family import open_family
        from mergesearch.merging.models.layer_importance import mean_importance

        family = open_family(self.recipe)
        items: Any = calibration
        return mean_importance(family.base, family.experts, self.layers, items)


def bits_of(layers: Sequence[BitLayer], widths: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """The bits of a recipe."""
    pairs = zip(layers, widths, strict=True)
    return tuple(sorted((name, width) for layer, width in pairs for name in layer.tensors))


def rows_of(subject: Subject) -> dict[str, Any]:
    """Test accuracy by way of choosing bits; and where the measures' choices rank among all."""
    bench = Bench(subject)
    count = len(bench.layers)
    halves = [*combinations(range(count), count // 2)]
    search = {half: bench.score(bench.rounded(_widths(half, count)), "search") for half in halves}
    best = max(search, key=lambda half: search[half])
    rows = {
        "not rounded": bench.score(bench.recipe, "test"),
        "uniform 4": bench.score(bench.rounded([4] * count), "test"),
        "uniform 3": bench.score(bench.rounded([3] * count), "test"),
    }
    ranks = {}
    for name, calibration in (("LIM", CALIBRATION), ("ZD", None)):
        order = np.argsort(bench.importance(calibration), kind="stable")
        half = tuple(sorted(order[count - count // 2 :].tolist()))
        rows[name] = bench.score(bench.rounded(_widths(half, count)), "test")
        ranks[name] = 1 + sum(value > search[half] for value in search.values())
    rows["best half by search items"] = bench.score(bench.rounded(_widths(best, count)), "test")
    rows["mean of all halves"] = float(
        np.mean([bench.score(bench.rounded(_widths(half, count)), "test") for half in halves])
    )
    return {"rows": rows, "ranks": ranks, "halves": len(halves), "best": best}


def _widths(half: Sequence[int], count: int) -> list[int]:
    return [4 if index in half else 2 for index in range(count)]


def searched(subject: Subject, label: str, bits: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy and bits of the winner of a study."""
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    folder = RUNS / f"{subject.name.replace(' ', '-')}-{label}"
    run = run_study(resolve(validate(study_of(subject, bits), subject.name), ROOT), folder)
    verdict = run.verdict
    assert verdict is not None
    report = json.loads((folder / "report.json").read_text())
    assert report
    winner = next(each for each in run.log.records if each.number == verdict.winner)
    values = verdict.scores["test"][verdict.winner].values
    layout = run.plan.layout
    assert layout is not None
    widths = dict(winner.recipe.bits)
    return {
        "test": 100 * values["accuracy"],
        "bits": [widths[layer.tensors[0]] for layer in bit_layers(layout)],
    }


def depth_rows() -> dict[str, Any]:
    """What blocks contribute, and coefficients that follow it in the average of four."""
    import torch

    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.models.blocks import block_chains
    from mergesearch.merging.models.calibration_spec import DEFAULTS
    from mergesearch.merging.models.expert_runner import ExpertRunner
    from mergesearch.merging.models.layer_importance import blocks_of, run_through, skip_changes

    bench = Bench(SUBJECTS[0])
    family = open_family(bench.recipe)
    options: Any = {**DEFAULTS, **CALIBRATION}
    runner = ExpertRunner(options, family.base, family.experts)
    added, skipped = [], []
    for expert in family.experts:
        runner.load_all(expert)
        items = runner.items(expert.name)

        def answer(items: Any = items) -> torch.Tensor:
            return torch.cat([runner.run(batch).logits for batch in items])

        passed = run_through(runner.model, blocks_of(runner, bench.layers), answer)
        added.append([each.relative / each.count for each in passed])
        (chain,) = block_chains(runner.model)
        skipped.append(skip_changes(runner.model, chain, answer))
    profiles = {
        "contribution": np.mean(added, axis=0),
        "change when skipped": np.mean(skipped, axis=0),
    }
    flat = np.ones(len(bench.layers))
    rising = np.linspace(0.5, 1.5, len(flat))
    shapes = {"flat": flat, "rising": rising, "falling": rising[::-1]}
    for name, profile in profiles.items():
        shapes[f"as {name}"] = profile / profile.mean()
        inverse = 1 / profile
        shapes[f"against {name}"] = inverse / inverse.mean()
    rows = {
        name: [bench.score(_shaped(bench, shape), split) for split in ("search", "test")]
        for name, shape in shapes.items()
    }
    return {"rows": rows, "profiles": {name: one.tolist() for name, one in profiles.items()}}


def _shaped(bench: Bench, shape: Floats) -> Recipe:
    """The average with coefficients of this shape over its blocks, and the same mean."""
    from mergesearch.spaces.groups import group_tensors

    layout = bench.plan.layout
    assert layout is not None
    row = np.full(len(layout.tensors), 0.25)
    number = {name: index for index, name in enumerate(layout.names)}
    blocks = [group for group in group_tensors(layout, "block") if group.depth is not None]
    for factor, group in zip(shape, blocks, strict=True):
        row[[number[name] for name in group.tensors]] = 0.25 * factor
    edges = [*layout.segment_starts(), layout.size]
    return bench.recipe.with_field(Field(np.array(edges), np.tile(row, (4, 1))).compact())


def _tables(chosen: Mapping[str, Any], studies: Mapping[str, Any], depth: Any) -> str:
    names = [subject.name for subject in SUBJECTS]
    lines = [
        f"| bits of the layers | mean | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    means = {"not rounded": "32", "uniform 4": "4"}
    for row in chosen[names[0]]["rows"]:
        figures = " | ".join(f"{chosen[name]['rows'][row]:.1f}" for name in names)
        lines.append(f"| {row} | {means.get(row, '3')} | {figures} |")
    for label in studies[names[0]]:
        figures = " | ".join(
            f"{studies[n][label]['test']:.1f}" if label in studies[n] else "" for n in names
        )
        lines.append(f"| {label} | 3 | {figures} |")
    lines += ["", "Rank of a measure's half among all of them on search items:", ""]
    lines += [f"| measure | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for measure in ("LIM", "ZD"):
        ranks = " | ".join(f"{chosen[n]['ranks'][measure]} of {chosen[n]['halves']}" for n in names)
        lines.append(f"| {measure} | {ranks} |")
    lines += ["", "Bits that the searches chose, from the first block to the last:", ""]
    lines += [
        f"- {name}, {label}: {' '.join(map(str, result['bits']))}"
        for name, results in studies.items()
        for label, result in results.items()
    ]
    lines += ["", "What blocks do, in the mean over the experts, from the first to the last:", ""]
    lines += [
        f"- {name}: {' '.join(f'{value:.2f}' for value in profile)}"
        for name, profile in depth["profiles"].items()
    ]
    lines += ["", "| coefficients over depth | search items | test items |", "|---|---|---|"]
    lines += [f"| {name} | {a:.1f} | {b:.1f} |" for name, (a, b) in depth["rows"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the tables."""
    import torch

    from experiments.zoo.building import silence_transformers

    silence_transformers()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    chosen, studies = {}, {}
    for subject in SUBJECTS:
        file = subject.name.replace(" ", "-")
        chosen[subject.name] = kept(RUNS / f"{file}.json", lambda s=subject: rows_of(s))  # type: ignore[misc]
        plans = {"searched, bits alone": {"only": True}}
        if subject is SUBJECTS[0]:
            plans["searched, with coefficients"] = {"only": False}
        studies[subject.name] = {
            label: kept(
                RUNS / f"{file}-{label[10:].replace(' ', '-')}.json",
                lambda s=subject, o=options, n=label: searched(  # type: ignore[misc]
                    s, n[10:].replace(" ", "-"), {"mean": 3.0, **o}
                ),
            )
            for label, options in plans.items()
        }
    depth = kept(RUNS / "depth.json", depth_rows)
    write_between(README, START, STOP, _tables(chosen, studies, depth))


if __name__ == "__main__":
    main()
