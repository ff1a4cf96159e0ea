"""Experiment 22: from models of other shapes to one merge, on the shapes zoo.

``python -m experiments.e0022_distill``

Two sources of other architectures and tokenizers are distilled into the pivot, one at a time, with
every alignment and fusion and several weights of the texts. What does best on validation texts is
merged and searched. Models and figures are kept in ``runs/distill``; the tables go into
``experiments/0022-distill/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo.shapes_data import HOME, LANGUAGES, exact_losses

ZOO = ROOT / "zoo" / "shapes"
RUNS = ROOT / "runs" / "distill"
README = ROOT / "experiments" / "0022-distill" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
#: Steps, rate and texts of a step of every distillation.
STEPS = 120
RATE = 3e-3
BATCH = 8
TRIALS = 25
ALL = (HOME, *LANGUAGES)
#: Merges of the two distilled models.
MERGES = ("average", "task_arithmetic", "ties", "varm", "sce")

Losses = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Way:
    """A way to distil."""

    alignment: str = "frequency"
    fusion: str = "mince"
    text_weight: float = 0.5

    @property
    def title(self) -> str:
        """For tables."""
        if self.text_weight == 1:
            return "the texts alone (λ = 1)"
        return f"{self.alignment}, {self.fusion}, λ = {self.text_weight:g}"


PAPER = Way(text_weight=0.9)
TEXTS = Way(text_weight=1.0)
WAYS = (
    TEXTS,
    PAPER,
    Way(),
    Way("edit"),
    Way("starts", text_weight=0.9),
    Way("starts"),
    Way("starts", "selection"),
)


def distilled(way: Way, language: str) -> Path:
    """Folder of the pivot that has learnt a language in some way."""
    from mergesearch.merging.distillation.distilling import distill
    from mergesearch.merging.distillation.settings import Settings
    from mergesearch.search.cli.models.distilling import read_texts

    out = RUNS / "models" / folder_name(way.title) / language
    if not out.is_dir():
        settings = Settings(
            way.alignment,
            way.fusion,
            way.text_weight,
            steps=STEPS,
            batch=BATCH,
            rate=RATE,
            held_out=0.0,
        )
        found = read_texts(ZOO / "transfer" / f"{language}.jsonl", "text")
        distill(str(ZOO / "pivot"), [str(ZOO / language)], found, out, settings)
    return out


@cache
def items(split: str) -> Mapping[str, list[str]]:
    """Texts of a split by language."""
    from experiments.zoo.shapes import split_texts

    return {name: split_texts(ZOO, name, split) for name in ALL}


def losses_of(folder: Path, split: str, languages: tuple[str, ...] = ALL) -> Losses:
    """Nats per word of a model on each text, by language; kept."""
    from experiments.zoo.shapes import load, word_losses

    def make() -> dict[str, Any]:
        model, tokenizer = load(folder)
        return {name: word_losses(model, tokenizer, items(split)[name]) for name in languages}

    name = folder_name(str(folder.relative_to(ROOT)))
    path = RUNS / "losses" / f"{name}-{split}-{'-'.join(languages)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return {key: np.array(value) for key, value in kept(path, make).items()}


def merged(operator: str, parents: Mapping[str, Path]) -> Path:
    """Folder of a merge of the distilled models."""
    from experiments.zoo.shapes import load
    from mergesearch.merging.in_memory import merge

    out = RUNS / "models" / f"merged-{operator}"
    if not out.is_dir():
        model, tokenizer = load(ZOO / "pivot")
        experts = {name: load(path)[0].state_dict() for name, path in parents.items()}
        model.load_state_dict(merge(model.state_dict(), experts, operator=operator))
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def searched(operator: str, parents: Mapping[str, Path]) -> Path:
    """Folder of the winner of a study over the distilled models."""
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    name = f"search-{operator}"
    out = RUNS / "models" / name
    if not out.is_dir():
        run_study(resolve(validate(study(operator, parents), name), ROOT), RUNS / name)
        command = [sys.executable, "-m", "mergesearch", "export", str(RUNS / name)]
        subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT)
    return out


def study(operator: str, parents: Mapping[str, Path]) -> dict[str, Any]:
    """The study of an operator, of the mean loss over the three languages."""
    return {
        "name": f"distill-{operator}",
        "base": str(ZOO / "pivot"),
        "experts": {name: str(path) for name, path in parents.items()},
        "operator": operator,
        "space": {"granularity": "block", "bounds": [0.0, 2.0]},
        "strategy": "cma_es",
        "evaluators": [
            {
                "kind": "perplexity",
                "data": {"file": {name: str(ZOO / "data" / name) for name in ALL}},
                "objectives": [{"metric": "log_perplexity"}],
            }
        ],
        "budget": {"trials": TRIALS},
    }


def cell(values: npt.NDArray[np.float64]) -> str:
    """Mean and half width of its 95 % interval over texts."""
    return f"{values.mean():.3f} ± {half(values):.3f}"


def half(values: npt.NDArray[np.float64]) -> float:
    """Half width of the 95 % interval of a mean."""
    return 1.96 * float(values.std(ddof=1)) / float(np.sqrt(len(values)))


def mean_cell(rows: Losses) -> str:
    """Mean over languages, with its interval."""
    width = np.sqrt(sum(half(row) ** 2 for row in rows.values())) / len(rows)
    return f"{np.mean([row.mean() for row in rows.values()]):.3f} ± {width:.3f}"


def ways_table(tested: Mapping[Way, Losses]) -> str:
    """Nats per word of each way on the language that was learnt, and less the texts alone."""
    heads = [f"{name} | less the texts alone" for name in LANGUAGES]
    lines = [f"| distilled by | {' | '.join(heads)} |", "|---" * (2 * len(LANGUAGES) + 1) + "|"]
    for way, rows in tested.items():
        gaps = {name: rows[name] - tested[TEXTS][name] for name in LANGUAGES}
        told = {name: "" if way == TEXTS else cell(gap) for name, gap in gaps.items()}
        cells = " | ".join(f"{cell(rows[name])} | {told[name]}" for name in LANGUAGES)
        note = " (FuseChat's setting)" if way == PAPER else ""
        lines.append(f"| {way.title}{note} | {cells} |")
    return "\n".join(lines)


def merges_table(rows: Mapping[str, Losses]) -> str:
    """Nats per word of each model on each language."""
    lines = [f"| model | {' | '.join(ALL)} | mean |", "|---" * (len(ALL) + 2) + "|"]
    for name, found in rows.items():
        cells = " | ".join(cell(found[one]) for one in ALL)
        lines.append(f"| {name} | {cells} | {mean_cell(found)} |")
    return "\n".join(lines)


def measured() -> str:
    """Run what is missing; the tables."""
    tested: dict[Way, Losses] = {}
    checked: dict[Way, float] = {}
    for way in WAYS:
        folders = {name: distilled(way, name) for name in LANGUAGES}
        tested[way] = {n: losses_of(f, "test", (n,))[n] for n, f in folders.items()}
        checked[way] = float(
            np.mean([losses_of(f, "validation", (n,))[n].mean() for n, f in folders.items()])
        )
        print(f"{way.title}: {checked[way]:.3f} on validation texts", flush=True)
    best = min((way for way in WAYS if way != TEXTS), key=lambda way: checked[way])
    parents = {name: distilled(best, name) for name in LANGUAGES}
    rows = {
        "who knows the tables": {n: np.array(exact_losses(n, items("test")[n])) for n in ALL},
        "pivot": losses_of(ZOO / "pivot", "test"),
    }
    rows |= {f"source {name}": losses_of(ZOO / name, "test") for name in LANGUAGES}
    rows |= {f"distilled {name}": losses_of(path, "test") for name, path in parents.items()}
    rows |= {name: losses_of(merged(name, parents), "test") for name in MERGES}
    title = f"**search over sce, {TRIALS} trials**"
    rows[title] = losses_of(searched("sce", parents), "test")
    return (
        f"{ways_table(tested)}\n\nMerged is what was distilled by {best.title}, the best on "
        f"validation texts.\n\n{merges_table(rows)}"
    )


def main() -> None:
    """Run what is missing, and write the tables."""
    from experiments.zoo.building import silence_transformers
    from experiments.zoo.shapes import build_shapes

    argparse.ArgumentParser(description="Distil models of other shapes, and merge.").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    silence_transformers()
    build_shapes(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    text = measured()
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
