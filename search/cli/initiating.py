"""The verb that writes a study from models and data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergesearch.search.cli.options import JsonOption, emit, say

if TYPE_CHECKING:
    from mergesearch.search.init.initiating import Initiated

FEW_ITEMS = "note        so few items make scores uncertain; with more, the winner is surer"


def init(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Base and experts: folders, org/name, MODEL+ADAPTER, or NAME=one of these.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Items to score merges on: a file, a folder, or a task of lm_eval; repeatable.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base; default: found among the models."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The study file to write.")] = Path(
        "study.yaml"
    ),
    minutes: Annotated[
        float, typer.Option(metavar="M", help="How long the study may take, about.")
    ] = 10.0,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the study; default: that of the data.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=COLUMN",
            help="A column that is not found by itself, such as label=stars; repeatable.",
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]A,B,...",
            help="Names of the classes in the order of the model's numbers; repeatable.",
        ),
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Do not time trials on this machine.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a study from models and data, with a comment for every choice.

    Looks at the models (which is the base, heads, tokenizers), at the data (columns, classes,
    splits) and at the time of a trial on this machine, and asks nothing that it can see.
    """
    from mergesearch.search.init.given import Request, parse_classes, parse_given, parse_pairs
    from mergesearch.search.init.initiating import init_study

    request = Request(
        models=tuple(map(parse_given, models)),
        data=tuple(map(parse_given, data or ())),
        out=out,
        base=base,
        minutes=minutes,
        name=name,
        columns=parse_pairs(column or (), "--column"),
        classes=parse_classes(classes or ()),
        measure=not no_measure,
        overwrite=overwrite,
    )
    done = init_study(request, _say)
    emit(_as_dict(done), as_json, lambda: _lines(done))


def _say(text: str) -> None:
    """Tell people who wait what is being done."""
    if sys.stderr.isatty():
        say(f"mergesearch: {text} ...")


def _as_dict(done: Initiated) -> dict[str, Any]:
    """What was found and written, for ``--json``."""
    from mergesearch.merging.lineage.description import lineage_dict
    from mergesearch.search.cli.check import plan_dict

    models = done.models
    return {
        "study": str(done.out),
        "schema": str(done.schema),
        "base": {"path": models.base.path, "reason": models.reason},
        "experts": {model.name: model.path for model in models.experts},
        "lineage": [lineage_dict(lineage) for lineage in models.lineages],
        "data": [
            {
                "name": file.name,
                "path": file.path,
                "items": file.rows,
                "columns": {column.name: column.kind for column in file.columns.values()},
                "splits": dict(file.splits),
            }
            for file in done.data
        ],
        "tasks": list(done.tasks),
        "cost": done.cost if isinstance(done.cost, str) else done.cost.to_dict(),
        "trials": done.size.trials,
        "seconds": done.size.seconds,
        "check": plan_dict(done.plan, None, None, models.lineages),
        "next": _next(done),
    }


def _lines(done: Initiated) -> list[str]:
    """The same for people: what was seen, what the check says, what to do next."""
    from mergesearch.search.cli.check import describe_plan, planned_cards
    from mergesearch.search.plan.preparing import preparing_of

    models = done.models
    cards = planned_cards(done.plan, None, None)
    preparing = preparing_of(done.plan, None if cards is None else cards.card)
    described = describe_plan(done.plan, cards, preparing, models.lineages)
    experts = ", ".join(f"{model.name} ({model.path})" for model in models.experts)
    return [
        f"base        {models.base.path}: {models.reason}{_another(models.reason)}",
        f"experts     {experts}",
        *(f"data        {_data_line(file)}" for file in done.data),
        *([FEW_ITEMS] if _few(done) else []),
        *([f"tasks       {', '.join(done.tasks)}"] if done.tasks else []),
        *_cost_lines(done),
        f"wrote       {done.out} and {done.schema}; its check says:",
        "",
        *described[: described.index("")],
        "",
        *(f"next        {command}" for command in _next(done)),
    ]


def _another(reason: str) -> str:
    """How to name another base than one that was guessed."""
    return "; --base MODEL names another" if reason.startswith("told from") else ""


def _few(done: Initiated) -> bool:
    from mergesearch.search.init.sections import FEW

    return 0 < sum(file.rows for file in done.data) < FEW


def _data_line(file: Any) -> str:
    named = ", ".join(file.splits.values())
    splits = f"splits {named}" if named else "divided by a hash"
    return f"{file.name}: {file.rows:,} items of {file.path}, {splits}; {file.listed}"


def _cost_lines(done: Initiated) -> list[str]:
    cost = done.cost
    if isinstance(cost, str):
        return [f"cost        not timed: {cost}"]
    scores = ", ".join(f"{name} {value:.3g}" for name, value in cost.base.items())
    part = "" if cost.timed == cost.items else f" of {cost.items:,}"
    items = f" on {cost.timed:,}{part} search items" if cost.items else ""
    return [
        f"base scores {scores}{items}",
        f"cost        {done.size.why}",
    ]


def _next(done: Initiated) -> list[str]:
    """The commands that lead on to a model."""
    name = done.plan.spec.name
    return [
        f"mergesearch check {done.out}",
        f"mergesearch run {done.out}",
        f"mergesearch show runs/{name}",
        f"mergesearch export runs/{name} --out {name}-merged",
    ]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        epilog="Example: mergesearch init models/base models/books models/films --data reviews.csv"
    )(init)
