"""Arguments that several verbs of the command line share, and how they print results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mergesearch.merging.foreign.shown import message_cut, printable
from mergesearch.search.cli.completing import complete_run, complete_setting
from mergesearch.search.redact import redact

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Folder of a run, for example runs/digits.",
        autocompletion=complete_run,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study file, for example budget.trials=50.",
        autocompletion=complete_setting,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write the model to.")
]
PreferOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=WEIGHT",
        help="Choose the trial of the front that suits this importance of the objectives; "
        "repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def emit(data: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    """Print a result for programs or for people; what could steer a terminal is escaped."""
    print(json.dumps(data, indent=1) if as_json else printable("\n".join(lines()), keep="\n"))


def say(text: str) -> None:
    """Print a line about what happens, or an error, to standard error.

    It holds no secret, nothing that could steer a terminal, and at most 300 characters beside the
    paths that it names.
    """
    print(message_cut(printable(redact(text))), file=sys.stderr, flush=True)
