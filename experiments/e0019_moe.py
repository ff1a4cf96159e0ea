"""Experiment 19: one mixture of experts made smaller, by every operator, with and without search.

``python -m experiments.e0019_moe``

Models are made by recipe as a user would make them. Finished figures are kept in ``runs/moe`` and
``runs/moe_upcycled`` and not made again; the tables go into ``experiments/0019-moe/README.md``,
between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo.moe import Settings, build_moe, load_model, loss_of
from experiments.zoo.skills import IGNORED, Example, scorer
from experiments.zoo.skills_data import SKILLS, SPLITS

if TYPE_CHECKING:
    from mergesearch.merging.mixture.recipe import MixtureRecipe

#: Name of a zoo's folder -> what is special, and how it is made.
ZOOS = {
    "moe": ("experts that began apart", Settings()),
    "moe_upcycled": ("experts that began as copies of one", Settings(upcycled=500)),
}
README = ROOT / "experiments" / "0019-moe" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
TRIALS = 100
#: Experts that a block keeps.
COUNTS = (6, 4, 2)
#: The zoo, and the number of experts, whose groups' weights are searched too.
SEARCHED = ("moe", 4)
#: Items of a forward pass for the loss.
BATCH = 100


@dataclass(frozen=True)
class Case:
    """An operator with hyperparameters beside the number of experts."""

    title: str
    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("pruned: the most used stay", "prune_experts"),
    Case("plain average of groups", "average_experts"),
    Case("mc_smoe", "mc_smoe"),
    Case("mc_smoe, router mean", "mc_smoe", {"router": "mean"}),
    Case("mc_smoe, router all (the paper's form)", "mc_smoe", {"router": "all"}),
    Case("mc_smoe, without alignment", "mc_smoe", {"align": False}),
    Case("mc_smoe, blocks by usage", "mc_smoe", {"allocation": "usage"}),
    Case("mc_smoe, rank 0.5, 10 % sparse", "mc_smoe", {"rank": 0.5, "density": 0.1}),
    Case("sub_moe (no truncation: mean by usage)", "sub_moe"),
    Case("sub_moe, rank 0.75", "sub_moe", {"rank": 0.75}),
    Case("sub_moe, rank 0.5", "sub_moe", {"rank": 0.5}),
    Case("sub_moe, router all", "sub_moe", {"router": "all"}),
    Case("sub_moe, neurons aligned (not in the paper)", "sub_moe", {"align": True}),
)


def runs_of(zoo: Path) -> Path:
    """Where figures and studies of a zoo are kept."""
    return ROOT / "runs" / zoo.name


def recipe_of(zoo: Path, case: Case, experts: int) -> MixtureRecipe:
    """The recipe of a case."""
    from mergesearch.merging.mixture.recipe import (
        MixtureRecipe,
        get_mixture_operator,
        parse_options,
    )

    calibration = {
        "data": str(zoo / "data" / "calibration"),
        "model_class": "AutoModelForCausalLM",
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        "samples": 360,
    }
    operator = get_mixture_operator(case.operator)
    options = parse_options(
        operator, {"experts": experts, "calibration": calibration, **case.options}
    )
    return MixtureRecipe("base", str(zoo / "base"), operator, options)


def row_of(zoo: Path, case: Case, experts: int) -> dict[str, Any]:
    """Make a model and measure it."""
    from mergesearch.merging.mixture.writing import shrink_mixture

    with TemporaryDirectory() as scratch:
        made = shrink_mixture(recipe_of(zoo, case, experts), Path(scratch) / "model")
        figures = measured(zoo, made.folder)
    counts = [len(block.groups) for block in made.plan.blocks]
    return {**figures, "bytes": made.after, "counts": counts, "stored": made.plan.stored}


def measured(zoo: Path, folder: Path) -> dict[str, Any]:
    """Accuracy by skill and loss of a model on test questions."""
    model = load_model(folder)
    return {"accuracy": scorer(zoo, "test")(model), "loss": answer_loss(zoo, model)}


def answer_loss(zoo: Path, model: Any) -> float:
    """Mean over test questions of all skills of the cross-entropy of the answer's tokens."""
    import torch

    examples = answered(zoo)
    losses = []
    with torch.inference_mode():
        for start in range(0, len(examples), BATCH):
            losses.append(float(loss_of(model, examples[start : start + BATCH])))
    return float(np.mean(losses))


def answered(zoo: Path) -> list[Example]:
    """Test questions with their right answers."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo / "base", local_files_only=True)
    examples = []
    for skill in SKILLS:
        for row in load_from_disk(str(zoo / "data" / skill / "test")):
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(f"{row['prompt']} {row['choices'][row['answer']]}")["input_ids"]
            labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
            examples.append((whole, labels))
    return examples


def search_weights(zoo: Path, experts: int) -> dict[str, Any]:
    """Search the weights of all groups of the mc_smoe merge, and measure the winner."""
    from mergesearch.merging.mixture.writing import shrink_mixture
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.runs.exporting import export_trial
    from mergesearch.search.runs.opened import open_run
    from mergesearch.search.spec.study_file import resolve, validate

    home = runs_of(zoo) / f"members-{experts}"
    case = Case("mc_smoe", "mc_smoe")
    made = shrink_mixture(
        recipe_of(zoo, case, experts), home / "base", members=home / "members", overwrite=True
    )
    name = f"weights-{experts}"
    places = "model.layers.{}.block_sparse_moe.experts.{}.*"
    groups = {
        f"block {block} expert {place}": places.format(block, place)
        for block, plan in enumerate(made.plan.blocks)
        for place in range(len(plan.slots))
    }
    study = weights_study(name, zoo, home / "base", made.members, groups)
    run_study(resolve(validate(study, name), ROOT), runs_of(zoo) / name)
    opened = open_run(runs_of(zoo) / name)
    winner = opened.trial(None)
    with TemporaryDirectory() as scratch:
        export_trial(opened, winner, Path(scratch) / "model", overwrite=False, rescored=False)
        figures = measured(zoo, Path(scratch) / "model")
    return {**figures, "bytes": made.after, "trial": winner.number, "kind": winner.kind}


def weights_study(
    name: str, zoo: Path, base: Path, members: Sequence[Path], groups: Mapping[str, str]
) -> dict[str, Any]:
    """A study of the weights of groups, with a coefficient for each member of each."""
    tasks = {"task": "skills", "splits": {split: split for split in SPLITS}}
    return {
        "name": name,
        "seed": 0,
        "base": str(base),
        "experts": {folder.name: str(folder) for folder in members},
        "operator": "task_arithmetic",
        "space": {
            "granularity": "task",
            "groups": groups,
            "exclude": [r"self_attn", r"norm", r"embed", r"gate\.weight"],
            "bounds": [-0.5, 1.0],
            "start": 0.0,
        },
        "strategy": "cma_es",
        "evaluators": [
            {"kind": "lm_eval", "include_path": str(zoo / "tasks"), "tasks": [tasks]},
        ],
        "budget": {"trials": TRIALS},
    }


def cells(figures: Mapping[str, Any]) -> str:
    """Accuracy by skill, their mean, the loss and the bytes as cells of a table."""
    scores = [figures["accuracy"][skill] for skill in SKILLS]
    shown = " | ".join(f"{100 * score:.1f}" for score in [*scores, float(np.mean(scores))])
    return f"{shown} | {figures['loss']:.3f} | {figures['bytes'] / 1e6:.2f}"


def head(first: str) -> list[str]:
    """The first lines of a table."""
    return [
        f"| {first} | {' | '.join(SKILLS)} | mean | loss | MB |",
        "|---" * (len(SKILLS) + 4) + "|",
    ]


def tables(zoo: Path) -> str:
    """Every case at every number of experts, then the searched weights."""
    runs = runs_of(zoo)
    runs.mkdir(parents=True, exist_ok=True)
    full = kept(runs / "full.json", partial(full_model, zoo))
    lines = [*head("8 experts"), f"| full model | {cells(full)} |", ""]
    for experts in COUNTS:
        lines += head(f"{experts} of 8 experts")
        lines += [f"| {case.title} | {cells(figures_of(zoo, case, experts))} |" for case in CASES]
        if (zoo.name, experts) == SEARCHED:
            found = kept(runs / "searched.json", partial(search_weights, zoo, experts))
            title = f"mc_smoe, weights of groups searched, {TRIALS} trials"
            lines.append(f"| {title} | {cells(found)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def full_model(zoo: Path) -> dict[str, Any]:
    """Figures of a zoo's model as it is."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.mixture.writing import bytes_of

    tensors = open_checkpoint(str(zoo / "base")).tensors
    return measured(zoo, zoo / "base") | {"bytes": bytes_of(tensors)}


def figures_of(zoo: Path, case: Case, experts: int) -> dict[str, Any]:
    """Figures of a case, from its file if they are there."""
    name = folder_name(f"{case.title}-{experts}")
    figures = kept(runs_of(zoo) / f"{name}.json", partial(row_of, zoo, case, experts))
    print(zoo.name, experts, case.title, f"{np.mean([*figures['accuracy'].values()]):.3f}")
    return figures


def tables_of_zoos(tables_of: Callable[[Path], str]) -> str:
    """The tables of every zoo, which is built where it is missing, under its name."""
    from experiments.zoo.building import one_thread, silence_transformers

    silence_transformers()
    parts = []
    for name, (what, settings) in ZOOS.items():
        zoo = build_moe(ROOT / "zoo" / name, settings)
        with one_thread():
            parts.append(f"**{what.capitalize()}** (`zoo/{name}`)\n\n{tables_of(zoo)}")
    return "\n\n".join(parts)


def main() -> None:
    """Make what is missing, and write the tables."""
    argparse.ArgumentParser(description="Make a mixture of experts smaller.").parse_args()
    write_between(README, START, STOP, tables_of_zoos(tables))


if __name__ == "__main__":
    main()
