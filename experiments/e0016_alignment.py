"""Do merges of models that share no start work once their units line up? (experiment 16)

``python -m experiments.e0016_alignment [--seeds 2]``

Every figure is of a model that was exported from a recipe and loaded again. Tables go into
``experiments/0016-alignment/README.md``, between its marks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo import digits
from experiments.zoo.building import one_thread, silence_transformers
from experiments.zoo.seeds import ITEMS, Settings, build_seeds

RUNS = ROOT / "runs" / "alignment"
README = ROOT / "experiments" / "0016-alignment" / "README.md"
#: Channels of the first stage of wide ResNets; others have 32.
WIDE = 48
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"


@dataclass(frozen=True)
class Pair:
    """Two models that are merged.

    Attributes:
        title: What the table calls them.
        kind: Folder of the zoo.
        expert: Name of the second; the first is ``a``.
        items: Items that both are compared on, and scored on.
        wide: Whether the second model has layers one and a half times as wide.
    """

    title: str
    kind: str
    expert: str
    items: str
    wide: bool = False

    def second(self, zoo: Path) -> Path:
        """The second model."""
        home = zoo.parent / zoo.name.replace("seeds", "seeds-wide", 1) if self.wide else zoo
        return home / self.kind / self.expert


@dataclass(frozen=True)
class Row:
    """How they are merged.

    Attributes:
        title: What the table calls it.
        align: The ``align`` key, without items; None for models as they are.
        on_items: Whether it takes items.
        regmean: Whether layers are fitted by RegMean, instead of averaged.
        kinds: Models that it is for.
        fit: What layers are fitted on by least squares (operator ``pleas``), instead of averaged:
            items or noise.
    """

    title: str
    align: Mapping[str, Any] | None
    on_items: bool = False
    regmean: bool = False
    kinds: tuple[str, ...] = ("vit", "resnet")
    fit: str = ""

    def suits(self, pair: Pair) -> bool:
        """Whether it merges such models."""
        joint = self.align is not None and {"method", "smoothing"} >= {*self.align}
        if pair.wide:
            return joint and (self.align or {})["method"] == "transport"
        return pair.kind in self.kinds


PAIRS = (
    Pair("ViTs, one task", "vit", "b", "upright"),
    Pair("ResNets, one task", "resnet", "b", "upright"),
    Pair("ResNets, two tasks", "resnet", "c", "both"),
    Pair("ResNets, one task, second 1.5 times as wide", "resnet", "b", "upright", wide=True),
)
ROWS = (
    Row("as they are", None),
    Row("as they are, RegMean", None, regmean=True),
    Row("weight matching", {"method": "weight_matching"}),
    Row("weight matching, rotated heads", {"method": "procrustes"}, kinds=("vit",)),
    Row("weight matching, mapped heads", {"method": "invertible"}, kinds=("vit",)),
    Row("weight matching, least squares on noise", {"method": "weight_matching"}, fit="noise"),
    Row("PLeaS, data-free, 25 % wider", {"method": "pleas", "fraction": 0.25}),
    Row("PLeaS, data-free, 50 % wider", {"method": "pleas", "fraction": 0.5}),
    Row("PLeaS, data-free, 100 % wider", {"method": "pleas", "fraction": 1.0}),
    Row(
        "PLeaS, data-free, 25 % wider, least squares on noise",
        {"method": "pleas", "fraction": 0.25},
        fit="noise",
    ),
    Row("PLeaS by activations, 25 % wider", {"method": "pleas", "fraction": 0.25}, on_items=True),
    Row("PLeaS by activations, 50 % wider", {"method": "pleas", "fraction": 0.5}, on_items=True),
    Row("activation matching", {"method": "activation_matching"}, on_items=True),
    Row(
        "activation matching, least squares (PLeaS at width 1)",
        {"method": "activation_matching"},
        True,
        fit="items",
    ),
    Row(
        "PLeaS by activations, 25 % wider, least squares",
        {"method": "pleas", "fraction": 0.25},
        True,
        fit="items",
    ),
    Row(
        "PLeaS by activations, 50 % wider, least squares",
        {"method": "pleas", "fraction": 0.5},
        True,
        fit="items",
    ),
    Row("optimal transport, smoothing 0.02", {"method": "transport", "smoothing": 0.02}, True),
    Row("optimal transport, smoothing 0.08", {"method": "transport"}, True),
    Row(
        "optimal transport, maps of branches averaged",
        {"method": "transport", "residual": "averaging"},
        True,
    ),
    Row(
        "optimal transport, weighted scalar",
        {"method": "transport", "residual": "weighted_scalar"},
        True,
    ),
    Row(
        "optimal transport, weighted matrix",
        {"method": "transport", "residual": "weighted_matrix"},
        True,
    ),
    Row("activation matching, RegMean", {"method": "activation_matching"}, True, regmean=True),
)


def recipe_of(zoo: Path, pair: Pair, row: Row, share: float) -> dict[str, Any]:
    """The recipe of a merge with some share of the second model."""
    items = {
        "data": str(zoo / "data" / pair.items),
        "split": "search",
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    expert: dict[str, Any] = {"path": str(pair.second(zoo))}
    if row.align is not None:
        expert["align"] = {**row.align, **({"calibration": items} if row.on_items else {})}
    base = str(zoo / pair.kind / "a")
    recipe: dict[str, Any] = {
        "base": base,
        "experts": {"b": expert},
        "operator": "task_arithmetic",
        "coefficients": share,
    }
    if row.regmean:
        recipe |= {
            "experts": {"a": base, "b": expert},
            "operator": "regmean",
            "hyperparameters": {"calibration": items},
            "coefficients": 1.0,
        }
    if row.fit:
        given = {"calibration": items} if row.fit == "items" else {}
        recipe |= {"operator": "pleas", "hyperparameters": given, "coefficients": 1.0}
    if pair.kind == "resnet":
        recipe["special"] = {"batch_norm": "recalibrate", "calibration": items}
    return recipe


def accuracy(zoo: Path, pair: Pair, row: Row, share: float) -> float:
    """Mean test accuracy of an exported merge over the domains of its items."""
    import yaml
    from transformers import AutoModelForImageClassification

    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.recipe_file import load_recipe

    chosen = np.array(json.loads((zoo / "manifest.json").read_text())["test_images"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe_of(zoo, pair, row, share)))
        export_model(load_recipe(path), Path(scratch, "merged"))
        model = AutoModelForImageClassification.from_pretrained(Path(scratch, "merged")).eval()
        found = digits.accuracies(model, chosen)
    return float(np.mean([found[domain] for domain in ITEMS[pair.items]]))


def ends(zoo: Path, pair: Pair) -> tuple[float, float]:
    """Mean test accuracies of both models by themselves."""
    domains = ITEMS[pair.items]
    found = []
    for model in (zoo / pair.kind / "a", pair.second(zoo)):
        known = json.loads((model.parent.parent / "manifest.json").read_text())["accuracy"]
        own = known[f"{pair.kind}/{model.name}"]
        found.append(float(np.mean([own[domain] for domain in domains])))
    return found[0], found[1]


def shown(figures: Sequence[float]) -> str:
    """Mean in percent, and the range over zoos."""
    percent = [100 * figure for figure in figures]
    mean = f"{np.mean(percent):.1f}"
    return mean if len(percent) < 2 else f"{mean} ({min(percent):.1f} to {max(percent):.1f})"


def measured(zoo: Path, pair: Pair, row: Row) -> float:
    """The accuracy of the average, kept in the run folder."""
    path = RUNS / f"{folder_name(f'{zoo.name} {pair.title} {row.title}')}.json"
    return float(kept(path, lambda: {"accuracy": accuracy(zoo, pair, row, 0.5)})["accuracy"])


def table(zoos: Sequence[Path]) -> str:
    """Test accuracy of averages, in percent."""
    lines = [
        f"| merge, half of each | {' | '.join(pair.title for pair in PAIRS)} |",
        f"|{'---|' * (1 + len(PAIRS))}",
    ]
    for which, title in enumerate(("the first model", "the second model")):
        cells = [shown([ends(zoo, pair)[which] for zoo in zoos]) for pair in PAIRS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for row in ROWS:
        figures = [
            [measured(zoo, pair, row) for zoo in zoos] if row.suits(pair) else [] for pair in PAIRS
        ]
        cells = [shown(each) if each else "" for each in figures]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="zoos (default: %(default)s)")
    options = parser.parse_args(arguments)
    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    zoos = []
    for seed in range(options.seeds):
        name = "seeds" if seed == 0 else f"seeds-{seed}"
        zoos.append(build_seeds(ROOT / "zoo" / name, Settings(seed=seed)))
        wide = name.replace("seeds", "seeds-wide", 1)
        build_seeds(ROOT / "zoo" / wide, Settings(seed=seed, width=WIDE))
    with one_thread():
        text = table(zoos)
    write_between(README, START, STOP, text)


if __name__ == "__main__":
    main()
