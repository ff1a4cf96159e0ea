"""The verbs that explain the study file: to people, and to editors."""

from __future__ import annotations

import json
import shutil
from typing import Annotated

import typer

from mergesearch.search.cli.completing import complete_topic
from mergesearch.search.cli.options import JsonOption, emit


def help_(
    topic: Annotated[
        str,
        typer.Argument(
            metavar="[TOPIC]",
            help="A key of the study file, such as evaluators.command.",
            autocompletion=complete_topic,
        ),
    ] = "study",
    as_json: JsonOption = False,
) -> None:
    """Explain a section of the study file: its keys, what each may be, defaults, meaning.

    Topics are the keys of the file, from `study` for all sections down to
    `evaluators.classification.data`, `strategy.cma_es` or `operator.ties`.
    """
    from mergesearch.search.plan.study_reference import find_topic

    found = find_topic(topic)
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    emit(found.to_dict(), as_json, lambda: found.lines(width))


def schema() -> None:
    """Print the JSON Schema of the study file, with which editors complete and check it.

    A first line `# yaml-language-server: $schema=FILE` in a study names the file that this prints.
    """
    from mergesearch.search.spec.sections import study_schema

    print(json.dumps(study_schema(), indent=1))


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("help", epilog="Example: mergesearch help evaluators.command")(help_)
    app.command(epilog="Example: mergesearch schema > study.schema.json")(schema)
