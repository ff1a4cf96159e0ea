"""The verb that rebuilds a merge and says whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesearch.search.cli.completing import complete_source
from mergesearch.search.cli.options import JsonOption, emit


def replay(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|EXPORT|RUN",
            help="A recipe, the folder of an exported model, or the folder of a run.",
            autocompletion=complete_source,
        ),
    ],
    trial: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of the run's trial; default: its winner."),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="STUDY.yaml|RUN",
            help="Also score the merge, against what the export or this run recorded.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep the rebuilt model in this folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rebuild a merge from its recipe and check that it is the same.

    Compares the weights with those that an export recorded, tensor by tensor where they are there,
    and scores with the record. Ends with code 1 where anything differs.
    """
    from mergesearch.merging import MergesearchError
    from mergesearch.search.runs.replay.replaying import replay as replay_merge
    from mergesearch.search.runs.replay.sources import open_source

    replayed = replay_merge(open_source(source, trial), study, out)
    emit(replayed.to_dict(), as_json, replayed.lines)
    if not replayed.agrees:
        raise MergesearchError(
            "the rebuilt merge is not the recorded one; did versions, device or sources change?"
        )


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        epilog="Example: mergesearch replay merged-model; "
        "mergesearch replay runs/digits --trial 17; "
        "mergesearch replay recipe.json --study study.yaml"
    )(replay)
