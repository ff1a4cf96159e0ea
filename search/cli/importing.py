"""The verb that reads mergekit's configurations as recipes and studies."""

from __future__ import annotations

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
            help="Study to write, whose search begins at this merge; evaluators are left to fill "
            "in.",
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
    from mergesearch.merging.mergekit_format.importing import import_mergekit
    from mergesearch.merging.recipe_file import recipe_text
    from mergesearch.search.plan.imported_study import study_text
    from mergesearch.spaces.groups import groupings_by_name

    if out is None and study is None:
        raise InputError("import: expected --out RECIPE.yaml or --study STUDY.yaml, received none")
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
    if out is not None:
        write_atomically(out, f"# From {source.name}\n{recipe_text(imported.recipe)}")
        stored = f" --dtype {imported.dtype}" if imported.dtype else ""
        result["recipe"] = str(out)
        lines.append(f"wrote {out}; `mergesearch merge {out} --out merged{stored}` makes the merge")
    if study is not None:
        write_atomically(study, study_text(imported, source))
        result["study"] = str(study)
        lines.append(f"wrote {study}; fill in evaluators, then `mergesearch check {study}`")
    emit(result, as_json, lambda: lines)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        name="import",
        epilog="Example: mergesearch import merge.yml --out recipe.yaml; "
        "mergesearch import merge.yml --study study.yaml",
    )(import_config)
