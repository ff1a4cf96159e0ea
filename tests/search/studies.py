"""Small analytic studies that the tests of the search run for real, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import resolve, validate


def analytic(
    name: str = "sphere", *, trials: int = 40, dim: int = 5, **sections: Any
) -> dict[str, Any]:
    """A study file of an analytic problem; ``sections`` replace or add top-level keys."""
    data: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "space": {"dim": dim, "bounds": [0.0, 1.0], "start": 0.3},
        "strategy": {"name": "cma_es"},
        "evaluators": [{"kind": "synthetic", "problem": "sphere", "items": 50, "noise": 0.05}],
        "budget": {"trials": trials},
        "selection": {"leaders": 3},
    }
    return data | sections


def spec_of(data: dict[str, Any], folder: Path) -> StudySpec:
    """Validated and resolved, as from a file in ``folder``."""
    return resolve(validate(data, "study.yaml"), folder)


def write_study(data: dict[str, Any], folder: Path) -> Path:
    """The study as a file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def run_in(data: dict[str, Any], folder: Path) -> Run:
    """Run to the end, inline, in ``folder``."""
    return run_study(spec_of(data, folder.parent), folder)


def fingerprint(run: Run) -> list[tuple[Any, ...]]:
    """What an undisturbed and a resumed run share: every trial with its point and result."""
    return [
        (
            r.number,
            r.kind,
            r.name,
            r.suggestion,
            r.recipe.digest,
            r.state,
            tuple(r.values.items()),
            r.tell_index,
        )
        for r in run.log.records
    ]
