"""The verb that reads mergekit's configurations as recipes and studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mergesearch.search.cli.options import JsonOption, emit


def import_config(
    source: Annotated[
        Path, typer.Argument(metavar="MERGE.yml", help="A configuration of mergekit.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RECIPE.yaml", help="Recipe to write.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            metavar="STUDY.yaml",
            help="Study to write, whose search begins at this merge.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="What merges of the study are scored on, as for `init`; without it, evaluators "
            "are left to fill in. Repeatable.",
        ),
    ] = None,
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Write what can be said, and list the rest as warnings."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read a mergekit configuration as a recipe, or as the start of a study.

    Every key that has no counterpart is listed and refused. Notes say where the same merge differs
    in detail.
    """
    from mergesearch.merging import InputError
    from mergesearch.merging.checkpoints.atomic import write_atomically
    from mergesearch.merging.foreign.shown import name_shown
    from mergesearch.merging.mergekit_format.importing import import_mergekit
    from mergesearch.merging.recipe_file import recipe_text
    from mergesearch.search.plan.imported_study import study_text
    from mergesearch.spaces.groups import groupings_by_name

    if out is None and study is None:
        raise InputError("import: expected --out RECIPE.yaml or --study STUDY.yaml, received none")
    if data and study is None:
        raise InputError("--data: expected --study STUDY.yaml beside it, received none")
    for path in (out, study):
        # A link is not replaced: it may be /dev/stdout.
        if path is not None and (path.is_symlink() or (path.exists() and not path.is_file())):
            raise InputError(f"{path}: expected a file to write, received something else")
    imported = import_mergekit(source, groupings_by_name)
    if imported.problems and not lenient:
        lines = [*imported.problems, "nothing was written; change these keys, or use --lenient"]
        raise InputError("\n".join(f"{source}: {line}" for line in lines))
    result: dict[str, Any] = {"problems": imported.problems, "notes": imported.notes}
    lines = [f"warning: {line}" for line in imported.problems]
    lines += [f"note: {line}" for line in imported.notes]
    evaluators = _evaluators(imported.recipe, data, study) if study is not None and data else []
    # All that can be wrong is known before anything is written.
    text = "" if study is None else study_text(imported, source, evaluators)
    if out is not None:
        write_atomically(out, f"# From {name_shown(source.name)}\n{recipe_text(imported.recipe)}")
        stored = f" --dtype {imported.dtype}" if imported.dtype else ""
        result["recipe"] = str(out)
        lines.append(f"wrote {out}; `mergesearch merge {out} --out merged{stored}` makes the merge")
    if study is not None:
        write_atomically(study, text)
        result["study"] = str(study)
        first = "" if evaluators else "fill in evaluators, then "
        lines.append(f"wrote {study}; {first}`mergesearch check {study}`")
    emit(result, as_json, lambda: lines)


def _evaluators(recipe: Mapping[str, Any], data: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """What a merge of the recipe's models is scored by on data, as ``init`` proposes it."""
    from mergesearch.search.init.given import Given, Request, parse_given
    from mergesearch.search.init.initiating import evaluators_for

    experts = tuple(Given(str(path), str(name)) for name, path in recipe["experts"].items())
    given = tuple(map(parse_given, data))
    return evaluators_for(Request(experts, given, out, base=str(recipe["base"])))


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        name="import",
        epilog="Example: mergesearch import merge.yml --out recipe.yaml; "
        "mergesearch import merge.yml --study study.yaml --data reviews.csv",
    )(import_config)
