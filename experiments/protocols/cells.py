"""The merges that a protocol asks for, one figure file for each; finished ones are kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.protocols.figures import goodness
from experiments.protocols.merges import (
    MULTITASK,
    Scorer,
    Scores,
    adapting_study,
    method_study,
    reference_study,
    steps_of,
)
from experiments.protocols.models_file import Models
from experiments.protocols.peak import Peak, peak
from experiments.protocols.protocol import Method, Protocol
from experiments.running import folder_name
from mergesearch.merging.checkpoints.atomic import write_atomically

if TYPE_CHECKING:
    from mergesearch.merging import Recipe
    from mergesearch.search.spec.sections import StudySpec

#: Module that imports what merging and scoring need.
LIBRARIES = "experiments.protocols.libraries"
#: Raise where figures of earlier versions mean something else.
FORMAT = 2


@dataclass(frozen=True)
class Cell:
    """One merge: a method, and the experts that it merges in the order of the file."""

    method: Method
    experts: tuple[str, ...]


def cells_of(protocol: Protocol, models: Models, methods: Sequence[Method]) -> list[Cell]:
    """All merges, method after method."""
    every = tuple(models.file.experts)
    groups = subsets(models) if protocol.subsets else [every]
    return [Cell(method, group) for method in methods for group in groups]


def subsets(models: Models) -> list[tuple[str, ...]]:
    """Subsets of the experts as the file asks for them, small ones first."""
    section = models.file.subsets
    every = tuple(models.file.experts)
    draw = random.Random(section.seed)
    found = []
    for size in section.sizes or range(2, len(every) + 1):
        whole = list(combinations(every, size))
        few = section.draws is not None and section.draws < len(whole)
        found += sorted(draw.sample(whole, section.draws or 0), key=whole.index) if few else whole
    return found


def file_of(protocol: Protocol, models: Models, cell: Cell, out: Path) -> Path:
    """Where the figures of a merge are; another file for everything that could change them."""
    spec = method_study(models, protocol, cell.method, cell.experts)
    content: dict[str, Any] = {
        "study": _given(spec),
        "method": asdict(cell.method),
        "choose": _choosing(models, cell),
        "rates": models.file.rates,
    }
    adaptation = cell.method.adaptation
    if adaptation is not None:
        adapting = adapting_study(models, cell.method, cell.experts)
        content["adapting"] = _given(adapting)
        content["steps"] = steps_of(models, adaptation)
    name = f"{folder_name(cell.method.label)}-{len(cell.experts)}-{_digest(content)}"
    return out / "merges" / f"{name}.json"


def references_file(models: Models, out: Path) -> Path:
    """Where the scores of base and experts are."""
    content = _given(reference_study(models))
    return out / "merges" / f"references-{_digest(content)}.json"


def _given(spec: StudySpec) -> dict[str, Any]:
    """A study without what is as it always is, so that new keys ask for nothing new."""
    given: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    return given


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def references(models: Models, out: Path) -> dict[str, Any]:
    """Test scores of the base, of every expert, and of the model of all tasks if there is one."""
    spec = reference_study(models)
    names = [*models.file.experts, *([] if models.file.multitask is None else [MULTITASK])]
    rows = {"base": [0.0] * len(names)}
    rows |= {name: [float(name == other) for other in names] for name in names}
    with Scorer(_planned(spec), out) as scorer:
        return {label: asdict(scorer.at(row, "test")) for label, row in rows.items()}


def measured(protocol: Protocol, models: Models, cell: Cell, out: Path) -> dict[str, Any]:
    """Scores of a merge on test items, its coefficient, and what it cost."""
    importlib.import_module(LIBRARIES)  # so that no method's time has them
    seconds = {"prepare": 0.0, "choose": 0.0, "score": 0.0}
    processor = time.process_time()
    spec = method_study(models, protocol, cell.method, cell.experts)
    with _timed(seconds, "choose"):
        recipe = _adapted(models, cell, out)
    with ExitStack() as stack:
        with _timed(seconds, "prepare"):
            scorer = stack.enter_context(Scorer(_planned(spec), out))
        with _timed(seconds, "choose"):
            chosen, line = _chosen(models, cell, scorer, _default(cell.method, spec))
        with _timed(seconds, "score"):
            tested = (
                scorer.at([chosen] * scorer.directions, "test")
                if recipe is None
                else scorer.of(recipe, "test")
            )
        highest: Peak = peak()
    seconds["processor"] = time.process_time() - processor
    return {
        "method": cell.method.label,
        "experts": list(cell.experts),
        "coefficient": None if recipe is not None else chosen,
        "validation": line,
        **asdict(tested),
        "seconds": seconds,
        "peak": asdict(highest),
    }


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the wall time of a block to a part."""
    began = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - began


def _default(method: Method, spec: StudySpec) -> float:
    """The coefficient of a method where validation items choose none."""
    from mergesearch.merging.operators import get_operator

    if method.coefficient is not None:
        return method.coefficient
    operator = get_operator(method.operator)
    return operator.default(len(spec.experts), operator.complete(spec.operator.options))


def _chosen(
    models: Models, cell: Cell, scorer: Scorer, default: float
) -> tuple[float, dict[str, float]]:
    """The coefficient, and the mean score of each that was tried on validation items."""
    line = {}
    for coefficient in cell.method.grid:
        found = scorer.at([coefficient] * scorer.directions, "validation")
        line[coefficient] = _mean(models, found, _choosing(models, cell))
    chosen = max(line, key=lambda one: line[one]) if line else default
    return chosen, {str(coefficient): value for coefficient, value in line.items()}


def _mean(models: Models, found: Scores, names: Sequence[str]) -> float:
    return sum(goodness(found.values[name], name, models.file.rates) for name in names) / len(names)


def _choosing(models: Models, cell: Cell) -> tuple[str, ...]:
    """Objectives by which a coefficient is chosen."""
    if models.file.choose_by is not None:
        return models.file.choose_by
    return tuple(name for expert in cell.experts for name in models.file.tasks[expert])


def _adapted(models: Models, cell: Cell, out: Path) -> Recipe | None:
    """The merge at which a method ends that follows a loss; a killed one goes on."""
    if cell.method.adaptation is None:
        return None
    from mergesearch.search.runs.driver import run_study

    spec = adapting_study(models, cell.method, cell.experts)
    name = f"{folder_name(cell.method.label)}-{_digest(_given(spec))}"
    run = run_study(spec, out / "studies" / name)
    (recommended,) = (record for record in run.log.records if record.kind == "recommended")
    shutil.rmtree(out / "studies" / ".arenas", ignore_errors=True)
    return recommended.recipe


def _planned(spec: StudySpec) -> Any:
    from mergesearch.search.plan.planning import plan_study

    return plan_study(spec)


def keep(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(figures, indent=1) + "\n")


def kept(path: Path) -> dict[str, Any] | None:
    """Figures that are there, or None."""
    if not path.is_file():
        return None
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures
