"""The studies of a soak: every strategy, and every evaluator that a small model has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.evaluations import kinds_of
from tests.architectures.trial import make_family, write_study_of
from tests.contracts.problems import CASES
from tests.search.conftest import make_pico_items, make_pico_models, model_study
from tests.search.strategies.every_strategy import label, study_of

#: Architectures whose studies have between them every evaluator of items that models of their
#: kinds have; the first of a kind is taken.
KINDS = sorted({kind for name in ARCHITECTURES for kind in kinds_of(name)})
TRIALS = 16
#: What the ``command`` evaluator runs: it scores coefficients, without a model.
PROGRAM = """
import json, sys
values = json.load(sys.stdin)["recipe"]["field"]["values"]
size = sum((each - 0.4) ** 2 for row in values for each in row)
print(json.dumps({"values": {"size": size}}))
"""


@dataclass(frozen=True)
class Subject:
    """A study that a soak runs.

    Attributes:
        name: Strategy and options, or evaluator.
        make: Gives the study's data.
        weights: A file of an expert that a disturbance may change, if the study has one.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    weights: Path | None = None


def prepare(folder: Path) -> None:
    """Make all models and items once."""
    make_pico_models(folder / "models")
    make_pico_items(folder / "items")
    for kind in KINDS:
        name = _architecture_of(kind)
        family = folder / "families" / kind
        family.mkdir(parents=True)
        make_family(ARCHITECTURES[name], family)
        write_study_of(name, family)


def subjects(folder: Path) -> list[Subject]:
    """All studies, over what ``prepare`` made in ``folder``."""
    models = folder / "models"
    items = folder / "items"
    expert = models / "left" / "model.safetensors"
    found = [
        Subject(
            "-".join(filter(None, (name, label(options)))),
            partial(study_of, name, options, models, items, seconds=0.01),
        )
        for name, options in CASES
    ]
    found += [
        Subject(
            f"evaluator {kind}",
            partial(_family_study, folder / "families" / kind),
            folder / "families" / kind / "left" / "model.safetensors",
        )
        for kind in KINDS
    ]
    found += [
        Subject(f"evaluator {kind}", partial(_pico_study, models, items, section), expert)
        for kind, section in _SECTIONS.items()
    ]
    return found


def _architecture_of(kind: str) -> str:
    return next(name for name in ARCHITECTURES if kind in kinds_of(name))


def _family_study(family: Path) -> dict[str, Any]:
    text = (family / "study.yaml").read_text()
    made_in = Path(yaml.safe_load(text)["base"]).parent  # a lane has a copy of what was prepared
    data: dict[str, Any] = yaml.safe_load(text.replace(str(made_in), str(family)))
    return data | {"name": family.name, "budget": {"trials": TRIALS}}


def _pico_study(models: Path, items: Path, section: dict[str, Any]) -> dict[str, Any]:
    study = model_study(models, items, budget={"trials": TRIALS}, strategy="sobol")
    (classified,) = study["evaluators"]
    data = {key: classified[key] for key in ("data", "domain", "id")}
    study["evaluators"] = [section if section["kind"] in _WITHOUT_ITEMS else data | section]
    return study | {"name": section["kind"], "allow_code": True}


#: Evaluators without items.
_WITHOUT_ITEMS = ("command", "distance")
_SECTIONS: dict[str, dict[str, Any]] = {
    "command": {
        "kind": "command",
        "command": [sys.executable, "-c", PROGRAM],
        "model": "none",
        "objectives": [{"name": "size", "direction": "minimize"}],
    },
    "distance": {"kind": "distance", "model_class": "AutoModelForImageClassification"},
    "entropy": {"kind": "entropy"},
}
