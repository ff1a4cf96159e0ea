"""Experiment 21: skills whose action heads share no start, merged under the masks of their tasks.

``python -m experiments.e0021_gridworld``

As in MergeVLA (Fu 2025), changes of the tower are summed once and used under a mask for each skill,
action heads stay those of the experts, and a router infers the skill of an episode from its first
observation. Beside it: merges without masks, with heads that are averaged or kept. A study searches
scale and threshold of attention and MLP. Figures are success rates of test episodes. The study and
the bundle are kept in ``runs/gridworld``; the tables go into
``experiments/0021-gridworld/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from experiments.running import ROOT, kept, write_between
from experiments.zoo.gridworld import SPLITS, build_gridworld
from experiments.zoo.gridworld_data import MOVES, SKILLS, new_boards, pixels
from mergesearch.merging import Field, Recipe

RUNS = ROOT / "runs" / "gridworld"
ZOO = ROOT / "zoo" / "gridworld"
README = ROOT / "experiments" / "0021-gridworld" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
EPISODES = 200
#: Episodes of each skill that a trial of the study runs.
SEARCHED = 60
TRIALS = 50
FUNCTIONS = "experiments.zoo.gridworld"
GROUPS = {"attention": ["*attention*"], "mlp": ["*mlp*"]}
#: λ: the middle of the authors' grid, MergeVLA's, and beyond.
THRESHOLDS = (0.4, 0.6, 1.0)
#: Coefficients of an average, and of a sum of changes.
THIRD = (1 / len(SKILLS),) * len(SKILLS)
WHOLE = (1.0,) * len(SKILLS)
Router = Literal["head", "learned", "none"]


def masks(router: Router, **options: Any) -> dict[str, Any]:
    """A section for merges under task masks."""
    learned = {"observations": f"{FUNCTIONS}:first_observations"} if router == "learned" else {}
    return policies("task_masks") | {"router": router, "groups": GROUPS} | learned | options


def policies(kind: str, **inputs: Any) -> dict[str, Any]:
    """A section with the success rate of each skill."""
    return {
        "kind": kind,
        "function": f"{FUNCTIONS}:successes_by_skill",
        "model_class": "AutoModelForImageClassification",
        "objectives": [{"name": name, "direction": "maximize"} for name in SKILLS],
        "inputs": {"episodes": EPISODES, **inputs},
    }


def study(
    zoo: Path, section: Mapping[str, Any], heads: str = "own", operator: Any = "task_arithmetic"
) -> dict[str, Any]:
    """A study of the zoo, whose trials the section measures."""
    return {
        "name": "gridworld",
        "base": str(zoo / "base"),
        "experts": {name: str(zoo / name) for name in SKILLS},
        "operator": operator,
        "special": {"heads": heads},
        "evaluators": [dict(section)],
        "strategy": "cma_es",
        "budget": {"trials": TRIALS},
        "allow_code": True,
    }


class Bench:
    """Scores merges of a study without running it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        from mergesearch.search.plan.planning import plan_study
        from mergesearch.search.spec.study_file import resolve, validate

        self.plan = plan_study(resolve(validate(dict(data), "gridworld"), ROOT))
        self.template = self.plan.template

    @cached_property
    def _worker(self) -> Any:
        from mergesearch.search.workers.messages import WorkerSpec
        from mergesearch.search.workers.worker import Worker

        evaluators = tuple(one.model_dump(mode="json") for one in self.plan.spec.evaluators)
        self._arenas = TemporaryDirectory()
        return Worker(WorkerSpec(self.template, evaluators, self._arenas.name))

    def static(self, row: Sequence[float]) -> list[float]:
        """Success rates of a merge without masks, by the coefficient of each direction."""
        size = self.template.field.size
        return self.rates(self.template.with_field(Field.constant(size, list(row))))

    def start(self) -> Recipe:
        """The merge at the start of the study's space: the operator's default, or that of masks."""
        return self.plan.space.decode(self.plan.space.start)

    def rates(self, recipe: Recipe) -> list[float]:
        """Success rate of each skill on test episodes."""
        from mergesearch.search.workers.messages import Task

        outcome = self._worker.run(Task("one", recipe, "test"))
        assert outcome.measurement is not None, outcome.failure
        return [float(value) for value in outcome.measurement.values.values()]

    def merge(self, recipe: Recipe) -> Any:
        """The model of a recipe under masks; valid until the next."""
        return self._worker.routed(recipe)


@contextmanager
def alike(zoo: Path) -> Iterator[Path]:
    """The zoo as if heads meant the same: averages of heads with other names are refused."""
    names = {str(number): f"LABEL_{number}" for number in range(len(MOVES))}
    numbers = {name: int(number) for number, name in names.items()}
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "zoo"
        copytree(zoo, plain)
        for skill in SKILLS:
            config = json.loads((zoo / skill / "config.json").read_text())
            text = json.dumps({**config, "id2label": names, "label2id": numbers})
            (plain / skill / "config.json").write_text(text)
        yield plain


def rows(zoo: Path, searched: Recipe) -> dict[str, list[float]]:
    """Way of merging -> success rate of each skill."""
    told = Bench(study(zoo, masks("none", inputs={"episodes": EPISODES, "told": True})))
    each: list[list[float]] = np.eye(len(SKILLS)).tolist()
    found = {
        "experts, each at its own skill": [told.static(row)[k] for k, row in enumerate(each)],
        "base tower, own heads": told.static([0.0] * len(SKILLS)),
    }
    with alike(zoo) as plain:
        found |= _with_average_heads(plain)
    found |= _without_masks(zoo, told)
    found |= _under_masks(zoo, told, searched)
    return found


def _with_average_heads(zoo: Path) -> dict[str, list[float]]:
    """Merges of everything, heads included."""
    averaged = Bench(study(zoo, policies("python"), "average"))
    found = {
        "average, average of heads": averaged.static(THIRD),
        "sum of changes, average of heads": averaged.static(WHOLE),
    }
    for name in ("ties", "tsv"):
        bench = Bench(study(zoo, policies("python"), "average", name))
        found[f"`{name}`, average of heads"] = bench.rates(bench.start())
    inputs = {"episodes": EPISODES, "told": True}
    masked = Bench(study(zoo, masks("none", inputs=inputs), "average"))
    found["masks at 0.6, average of heads, skill told"] = masked.rates(masked.start())
    return found


def _without_masks(zoo: Path, told: Bench) -> dict[str, list[float]]:
    """Merges that are the same for all skills, but for heads."""
    found = {
        "average, own heads": told.static(THIRD),
        "sum of changes, own heads": told.static(WHOLE),
    }
    for name in ("ties", "tsv"):
        parts = []
        for place, skill in enumerate(SKILLS):
            bench = Bench(study(zoo, policies("python") | {"head": skill}, operator=name))
            parts.append(bench.rates(bench.start())[place])
        found[f"`{name}`, own heads"] = parts
    return found


def _under_masks(zoo: Path, told: Bench, searched: Recipe) -> dict[str, list[float]]:
    """Merges under the masks of skills."""
    found = {}
    for value in THRESHOLDS:
        found[f"masks at {value}, own heads, skill told"] = told.rates(at(told.start(), value))
    for router in ("head", "learned"):
        bench = Bench(study(zoo, masks(router)))
        found[f"masks at 0.6, own heads, router `{router}`"] = bench.rates(bench.start())
        if router == "learned":
            ours = replace(bench.start(), routing=searched.routing)
            found["masks searched, own heads, router `learned`"] = bench.rates(ours)
    parameters = {**dict(told.start().routing), **_searched_values(searched)}
    ours = replace(told.start(), routing=tuple(sorted(parameters.items())))
    found["masks searched, own heads, skill told"] = told.rates(ours)
    return found


def at(recipe: Recipe, threshold: float) -> Recipe:
    """A merge with one threshold for all groups."""
    routing = {k: threshold if k.startswith("threshold") else v for k, v in recipe.routing}
    return replace(recipe, routing=tuple(sorted(routing.items())))


def _searched_values(recipe: Recipe) -> dict[str, float]:
    """Scale and threshold of every group."""
    return {k: v for k, v in recipe.routing if k.startswith(("scale.", "threshold."))}


def searched_recipe(zoo: Path, runs: Path) -> dict[str, Any]:
    """The winner of a study of scales and thresholds, and what its bundle takes."""
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.runs.exported import export_bundle, rescore
    from mergesearch.search.spec.study_file import resolve, validate

    section = masks("learned", function=f"{FUNCTIONS}:success")
    section["objectives"] = [{"name": "success", "direction": "maximize"}]
    section["inputs"] = {"episodes": SEARCHED}
    section["sizes"] = dict.fromkeys(SPLITS, SEARCHED * len(SKILLS))
    spec = resolve(validate(study(zoo, section), "gridworld"), ROOT)
    run = run_study(spec, runs / "study")
    assert run.verdict is not None
    record = run.log.records[run.verdict.winner]
    assert record.recipe.routing, "an anchor won"
    bundle = runs / "bundle"
    export_bundle(run, record, bundle, facts={}, overwrite=True, threads=1)
    return {
        "recipe": record.recipe.to_dict(),
        "identical": rescore(run, record, bundle).agreement.identical,
        "bytes": _weights(bundle),
        "experts": sum(_weights(zoo / name) for name in SKILLS),
        "base": _weights(zoo / "base"),
    }


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def routed_rates(zoo: Path, router: Router) -> list[float]:
    """Share of the first test observations of each skill that a router gives to it."""
    import torch

    bench = Bench(study(zoo, masks(router)))
    merge = bench.merge(bench.start())
    found = []
    for index, (name, skill) in enumerate(SKILLS.items()):
        boards = new_boards(skill, EPISODES, (SPLITS["test"], index))
        tasks = merge.tasks_of(pixel_values=torch.from_numpy(pixels(skill, boards)))
        found.append(tasks.count(name) / EPISODES)
    return found


def used_by(zoo: Path, threshold: float) -> list[float]:
    """Share of changed weights that no skill, one, two, ... all of them use."""
    bench = Bench(study(zoo, masks("none")))
    merge = bench.merge(at(bench.start(), threshold))
    counts = np.zeros(len(SKILLS) + 1)
    for own in merge.held.values():
        bits = np.unpackbits(own["mask"].numpy(), axis=1, count=own["sum"].numel())
        counts += np.bincount(bits.sum(axis=0), minlength=counts.size)
    shares: list[float] = (counts / counts.sum()).tolist()
    return shares


def measured() -> dict[str, Any]:
    """All figures."""
    zoo = build_gridworld(ZOO)
    found = kept(RUNS / "searched.json", lambda: searched_recipe(zoo, RUNS))
    recipe = Recipe.from_dict(found["recipe"])
    return {
        "rows": rows(zoo, recipe),
        "searched": _searched_values(recipe),
        "routers": {router: routed_rates(zoo, router) for router in ("head", "learned")},
        "used": {str(value): used_by(zoo, value) for value in THRESHOLDS},
        **{key: found[key] for key in ("identical", "bytes", "experts", "base")},
    }


def text_of(figures: Mapping[str, Any]) -> str:
    """Tables and sentences of the page."""
    lines = [f"| policy | {' | '.join(SKILLS)} | mean |", "|---" * (len(SKILLS) + 2) + "|"]
    for way, rates in figures["rows"].items():
        shown = " | ".join(f"{100 * rate:.0f}" for rate in (*rates, float(np.mean(rates))))
        lines.append(f"| {way} | {shown} |")
    lines += ["", "First observations that a router gives to their skill, %:", ""]
    lines += [f"| router | {' | '.join(SKILLS)} |", "|---" * (len(SKILLS) + 1) + "|"]
    for router, rates in figures["routers"].items():
        lines.append(f"| `{router}` | {' | '.join(f'{100 * rate:.0f}' for rate in rates)} |")
    lines += ["", "Weights that so many skills use, % of those that any expert changes:", ""]
    lines += ["| λ | none | one (selfish) | two | all |", "|---|---|---|---|---|"]
    for value, shares in figures["used"].items():
        lines.append(f"| {value} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |")
    values = ", ".join(f"{name} {value:.2f}" for name, value in figures["searched"].items())
    same = "identical to" if figures["identical"] else "DIFFERENT from"
    last = (
        f"Searched: {values}. Its bundle takes {figures['bytes'] / 1000:.0f} kB of weights, base "
        f"included; the experts take {figures['experts'] / 1000:.0f} kB and the base "
        f"{figures['base'] / 1000:.0f}. Loaded and scored again it is {same} the record."
    )
    return "\n".join([*lines, "", last])


def main() -> None:
    """Train, measure, and write the tables."""
    import torch

    from experiments.zoo.building import silence_transformers

    silence_transformers()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    write_between(README, START, STOP, text_of(kept(RUNS / "figures.json", measured)))


if __name__ == "__main__":
    main()
