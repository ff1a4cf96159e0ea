"""Arguments that several verbs of the command line share, and how they print results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/digits.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study file, for example budget.trials=50.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def emit(data: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    """Print a result for programs or for people."""
    print(json.dumps(data, indent=1) if as_json else "\n".join(lines()))
