"""Experiment 18: what packs of experts take, and what each expert has left when it comes back.

``python -m experiments.e0018_reversible``

Experts of the digits, clip and skills zoos are packed (``mergesearch pack``) with 1-bit masks (TALL
masks: λ 0.4, and λ chosen for each expert on validation items from the paper's grid), and as
low-rank task vectors with and without a shared basis (reversible model merging). Each expert is
restored and scored on the test items of its task. Bytes are those of all files of a pack, over
those of the weights of all experts; the base is needed beside it. Figures are kept in
``runs/reversible``; the tables go into ``experiments/0018-reversible/README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo_scores import SCORED, Zoo, one_hot, scores
from mergesearch.merging.export.packing import PackSettings, pack_experts

Split = Literal["search", "validation", "test"]
RUNS = ROOT / "runs" / "reversible"
README = ROOT / "experiments" / "0018-reversible" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
#: λ of the paper.
GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
#: Beyond it: 1 keeps a weight where the expert's own change is nearer than none.
WIDE = (*GRID, 0.8, 1.0, 1.5)
RANKS = (4, 8, 16, 32)
#: Rank and directions of a basis.
BASES = ((16, 1), (16, 2), (16, 3))
ZOOS = ("digits", "clip", "skills")
#: Zoos on which λ is chosen beyond the paper's grid too; the skills take longest to score.
BEYOND = ("digits", "clip")


def packed(zoo: Zoo, settings: PackSettings, split: Split = "test") -> dict[str, Any]:
    """Bytes of a pack, what each expert lost, and its score on its own task."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "pack"
        pack = pack_experts(str(zoo.folder / "base"), zoo.paths, out, settings)
        found = scores(zoo, {name: str(out / name) for name in zoo.experts}, one_hot(zoo), split)
    return {
        "bytes": pack.size,
        "share": pack.share,
        "errors": dict(pack.errors),
        "scores": {name: found[name][name] for name in zoo.experts},
    }


def whole(zoo: Zoo) -> dict[str, Any]:
    """The experts themselves."""
    found = scores(zoo, zoo.paths, one_hot(zoo))
    size = sum(
        file.stat().st_size
        for name in zoo.experts
        for file in (zoo.folder / name).glob("*.safetensors")
    )
    return {
        "bytes": size,
        "share": 1.0,
        "errors": dict.fromkeys(zoo.experts, 0.0),
        "scores": {name: found[name][name] for name in zoo.experts},
    }


def chosen(zoo: Zoo, grid: tuple[float, ...]) -> dict[str, float]:
    """λ of each expert with the best validation score, the smallest of equals."""
    tried = {
        value: _kept(
            zoo,
            f"masks {value} validation",
            PackSettings(thresholds=dict.fromkeys(zoo.experts, value)),
            "validation",
        )
        for value in grid
    }
    return {
        name: max(grid, key=lambda value: (tried[value]["scores"][name], -value))
        for name in zoo.experts
    }


def _kept(zoo: Zoo, label: str, settings: PackSettings, split: Split = "test") -> dict[str, Any]:
    file = RUNS / f"{folder_name(f'{zoo.name} {label}')}.json"
    return kept(file, lambda: packed(zoo, settings, split))


def rows(zoo: Zoo) -> dict[str, dict[str, Any]]:
    """Label -> figures of every way to keep the experts of a zoo."""
    found = {"all experts": kept(RUNS / f"{zoo.name}-whole.json", lambda: whole(zoo))}
    found["masks, λ 0.4"] = _kept(zoo, "masks 0.4", PackSettings())
    grids = {"0.2 to 0.6": GRID} | ({"0.2 to 1.5": WIDE} if zoo.name in BEYOND else {})
    for label, grid in grids.items():
        values = chosen(zoo, grid)
        said = ", ".join(f"{value:g}" for value in values.values())
        found[f"masks, λ by validation from {label} ({said})"] = _kept(
            zoo, f"masks from {label}", PackSettings(thresholds=values)
        )
    for rank in RANKS:
        found[f"rank {rank}"] = _kept(zoo, f"rank {rank}", PackSettings(rank))
    for rank, directions in BASES:
        label = f"rank {rank}, basis of {directions}"
        found[label] = _kept(zoo, label, PackSettings(rank, directions))
    return found


def table(zoo: Zoo, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Bytes, loss, scores and the share of the experts' that is left."""
    own = found["all experts"]["scores"]
    head = ["bytes", "of all experts", "off by (mean)", *zoo.experts, "mean"]
    head += ["recovered, mean", "recovered, least"]
    lines = [f"| {zoo.name} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for label, figures in found.items():
        values = [100 * figures["scores"][name] for name in zoo.experts]
        left = [100 * figures["scores"][name] / own[name] for name in zoo.experts]
        cells = [
            label,
            f"{figures['bytes']:,}",
            f"{100 * figures['share']:.1f} %",
            f"{100 * float(np.mean([*figures['errors'].values()])):.0f} %",
            *(f"{value:.1f}" for value in values),
            f"{float(np.mean(values)):.1f}",
            f"{float(np.mean(left)):.1f} %",
            f"{min(left):.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not kept, and write the tables."""
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    tables = []
    for label in ZOOS:
        zoo = SCORED[label]
        tables.append(table(zoo, rows(zoo)))
        print(tables[-1], flush=True)
    write_between(README, START, STOP, "\n\n".join(tables))


if __name__ == "__main__":
    main()
