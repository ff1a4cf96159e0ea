"""The verb that repairs the journal of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from mergesearch.search.cli.options import JsonOption, RunArgument, emit


def repair(
    folder: RunArgument,
    yes: Annotated[
        bool, typer.Option("--yes", help="Write it; without it is only said what would be kept.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what can be kept of a damaged journal, and repair it.

    Keeps all lines that stand, before and after the damage, and the journal as it was under another
    name. The next `mergesearch run` measures again what is lost.
    """
    from mergesearch.search.runs.repair.repairing import repair as repair_journal

    done = repair_journal(folder, write=yes)
    emit(done.to_dict(), as_json, done.text)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(epilog="Example: mergesearch repair runs/digits, then with --yes")(repair)
