"""Runs a protocol: checks everything first, then one process for each method."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from experiments.protocols.cells import (
    LIBRARIES,
    Cell,
    cells_of,
    file_of,
    keep,
    kept,
    measured,
    references,
    references_file,
)
from experiments.protocols.figures import (
    Judge,
    Row,
    experts_row,
    method_row,
    reference_row,
)
from experiments.protocols.merges import (
    MULTITASK,
    adapting_study,
    check_objectives,
    method_study,
    reference_study,
)
from experiments.protocols.models_file import Models
from experiments.protocols.protocol import Method, Protocol
from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import line_cut, printable

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        methods: Those that run.
        left_out: Method -> why it does not.
        minimised: Objectives of which less is better.
    """

    methods: tuple[Method, ...]
    left_out: Mapping[str, str]
    minimised: frozenset[str]


@dataclass(frozen=True)
class Results:
    """The rows of a finished protocol, and what is missing.

    Attributes:
        rows: References first.
        tasks: In the order of the file.
        left_out: Method -> why it did not run.
        failed: Method and experts -> what went wrong.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    left_out: Mapping[str, str]
    failed: Mapping[str, str] = field(default_factory=dict)


def check(protocol: Protocol, models: Models, chosen: Sequence[str] = ()) -> Checked:
    """Plan every method on headers and items, before weights are read.

    Args:
        protocol: The protocol.
        models: Its models.
        chosen: Labels of methods; all by default.

    Raises:
        InputError: If the file is wrong; what a single method cannot do is why it is left out.
    """
    from mergesearch.search.plan.lineage import lineage_warnings, study_lineages
    from mergesearch.search.plan.planning import plan_study

    plan = plan_study(reference_study(models))
    check_objectives(models, plan)
    lineage_warnings(plan, study_lineages(plan))
    reasons: dict[str, str] = {}
    for method in protocol.methods:
        if chosen and method.label not in chosen:
            reasons[method.label] = "not asked for"
            continue
        reason = _refused(protocol, models, method)
        if reason is not None:
            reasons[method.label] = reason
    able = tuple(method for method in protocol.methods if method.label not in reasons)
    minimised = (one.name for one in plan.objectives if one.direction == "minimize")
    return Checked(able, reasons, frozenset(minimised))


def _refused(protocol: Protocol, models: Models, method: Method) -> str | None:
    """Why a method cannot run, or None."""
    from mergesearch.merging.operators import get_operator
    from mergesearch.search.plan.planning import plan_study

    if "inputs" in get_operator(method.operator).needs and models.file.calibration is None:
        return "it runs the experts on items, and the file has no `calibration`"
    if method.adaptation is not None and models.file.adaptation is None:
        return "it follows a loss of unlabelled items, and the file has no `adaptation`"
    every = tuple(models.file.experts)
    try:
        plan_study(method_study(models, protocol, method, every))
        if method.adaptation is not None:
            plan_study(adapting_study(models, method, every))
    except InputError as error:
        return str(error).splitlines()[0]
    return None


def run(
    protocol: Protocol,
    models: Models,
    out: Path,
    checked: Checked,
    *,
    apart: bool = True,
    say: Say = lambda text: None,
) -> Results:
    """Run what is missing and read what is kept.

    Args:
        protocol: The protocol.
        models: Its models.
        out: Folder of figures and of weights while they are prepared.
        checked: What :func:`check` found.
        apart: A process for each method, so that peaks of memory are told apart.
        say: Told of every merge.

    Raises:
        StudyFailedError: If base and experts cannot be scored.
    """
    path = references_file(models, out)
    known = kept(path)
    if known is None:
        _in_process(_keep_references, (models, out), apart)
        known = kept(path)
    assert known is not None
    say("base and experts")
    failed: dict[str, str] = {}
    rows = []
    judge = _judge(models, known, checked)
    for method in checked.methods:
        cells = cells_of(protocol, models, [method])
        missing = [cell for cell in cells if kept(file_of(protocol, models, cell, out)) is None]
        if missing:
            failed |= _run_method(protocol, models, missing, out, apart)
        found = [kept(file_of(protocol, models, cell, out)) for cell in cells]
        done = [figures for figures in found if figures is not None]
        rows += _by_number(judge, done)
        say(f"{method.label}: {len(done)} of {len(cells)}")
    first = [reference_row(judge, "base", judge.base), experts_row(judge)]
    if MULTITASK in known:
        first.append(reference_row(judge, "multitask model", known[MULTITASK]["values"]))
    return Results((*first, *rows), tuple(models.file.tasks), checked.left_out, failed)


def _by_number(judge: Judge, found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each number of experts."""
    sizes = sorted({len(figures["experts"]) for figures in found})
    return [
        method_row(judge, [figures for figures in found if len(figures["experts"]) == size])
        for size in sizes
    ]


def _judge(models: Models, known: Mapping[str, Any], checked: Checked) -> Judge:
    file = models.file
    return Judge(
        {name: file.tasks[name] for name in file.experts},
        file.held_out,
        file.general or (),
        file.rates,
        checked.minimised,
        known["base"]["values"],
        {name: known[name]["values"] for name in file.experts},
    )


def _run_method(
    protocol: Protocol, models: Models, cells: Sequence[Cell], out: Path, apart: bool
) -> dict[str, str]:
    """Run merges of one method; what failed, by name."""
    try:
        return dict(_in_process(_keep_cells, (protocol, models, cells, out), apart))
    except BrokenProcessPool:
        return {
            _name(cell): "its process ended; it may have run out of memory"
            for cell in cells
            if kept(file_of(protocol, models, cell, out)) is None
        }


def _name(cell: Cell) -> str:
    return f"{cell.method.label} ({', '.join(cell.experts)})"


def _keep_references(models: Models, out: Path) -> None:
    keep(references_file(models, out), references(models, out))


def _keep_cells(
    protocol: Protocol, models: Models, cells: Iterable[Cell], out: Path
) -> dict[str, str]:
    """Measure and keep merges; one that fails does not stop the others."""
    failed = {}
    for cell in cells:
        try:
            keep(file_of(protocol, models, cell, out), measured(protocol, models, cell, out))
        except Exception as error:
            failed[_name(cell)] = line_cut(printable(f"{type(error).__name__}: {error}"))
    return failed


def _in_process(function: Callable[..., Any], arguments: Sequence[Any], apart: bool) -> Any:
    """The result of a call, in a process of its own or in this one."""
    if not apart:
        return function(*arguments)
    # Forked from a server that has the libraries and no threads, where the system can.
    server = "forkserver" in get_all_start_methods()
    context = get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload([LIBRARIES])
    with ProcessPoolExecutor(1, context, _quiet) as pool:
        return pool.submit(function, *arguments).result()


def _quiet() -> None:
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    os.dup2(2, 1)  # what libraries print would stand among the results
