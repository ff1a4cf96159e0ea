"""Shapes of the events in the record of a judge, by what they tell."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from mergesearch.merging import RunFolderError
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import shown
from mergesearch.search.record.shapes import Name, conform

#: As ``pairing.digest`` gives it.
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class StudyEvent(TypedDict):
    """The study that the record belongs to."""

    study: Name


class ChoiceEvent(TypedDict):
    """What was preferred of a pair."""

    objective: Name
    prompt: Digest
    pair: Digest
    left: Digest
    right: Digest
    choice: Literal["left", "right", "tie"]


class UndoEvent(TypedDict):
    """A choice that was taken back."""

    pair: Digest


class OutputRow(TypedDict):
    """What a model made of a prompt."""

    prompt: str
    output: Digest
    kind: Literal["text", "png", "jpeg", "gif", "webp"]
    text: str


class ModelEvent(TypedDict):
    """A merge with its outputs and the comparisons that it needs."""

    objective: Name
    split: Literal["search", "validation", "test"]
    recipe: Name
    model: Digest
    question: str
    outputs: list[OutputRow]
    slots: list[Annotated[list[Digest], Field(min_length=2, max_length=2)]]


SHAPES: dict[str, Any] = {
    "study": StudyEvent,
    "choice": ChoiceEvent,
    "undo": UndoEvent,
    "model": ModelEvent,
}


def check_event(event: Any, where: str) -> dict[str, Any]:
    """The event, once its shape is known.

    Args:
        event: As JSON gave it.
        where: File and line, as errors name them.

    Raises:
        RunFolderError: With what was expected and received.
    """
    node = Node(event, where, RunFolderError)
    kind = node.at("event")
    if kind.text() not in SHAPES:
        raise kind.wrong(f"one of {', '.join(SHAPES)}")
    found: dict[str, Any] = conform(SHAPES[kind.text()], event, where)
    for row in found["outputs"] if kind.text() == "model" else ():
        # A picture is a file beside the record: its name leads nowhere else.
        if row["kind"] != "text" and row["text"] != f"{row['output']}.{row['kind']}":
            raise RunFolderError(
                f"{where}: outputs: expected the name of a picture, received {shown(row['text'])}"
            )
    return found
