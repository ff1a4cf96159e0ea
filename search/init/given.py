"""What the user gives: paths, some of them with names, and where the study finds them again."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.locations import split_path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Given:
    """A path or a name, and what the user calls it.

    Attributes:
        value: The path, the name of the hub, or the name of a task.
        name: What it is called; empty where the user did not say.
    """

    value: str
    name: str = ""


@dataclass(frozen=True)
class Request:
    """What ``mergesearch init`` is asked for.

    Attributes:
        models: Base and experts, or experts alone.
        data: Files, folders, or tasks of lm_eval.
        out: The study file.
        base: The base; None: it is found among the models.
        minutes: How long the study may take, about.
        name: Of the study; by default that of the data.
        columns: Role -> column of the data, where the user says so.
        classes: Name of the data ("" for all) -> names of the classes in the model's order.
        measure: Whether trials are timed on this machine.
        overwrite: Whether files may be replaced.
    """

    models: tuple[Given, ...]
    data: tuple[Given, ...]
    out: Path
    base: str | None = None
    minutes: float = 10.0
    name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    measure: bool = True
    overwrite: bool = False


def parse_given(text: str) -> Given:
    """A value with or without a name before ``=``; what exists as a whole has none."""
    name, separator, value = text.partition("=")
    named = separator and _NAME.fullmatch(name) and value
    return Given(value, name) if named and not Path(text).exists() else Given(text)


def parse_pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """``KEY=VALUE`` pairs of an option.

    Raises:
        InputError: If one is no pair.
    """
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not (separator and key and value):
            raise InputError(f"{option} {text}: expected ROLE=COLUMN, such as label=stars")
        pairs[key] = value
    return pairs


def parse_classes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Names of classes, of all data or of those with a name: ``bad,good``, ``films=bad,good``."""
    found = {}
    for given in map(parse_given, texts):
        names = [name.strip() for name in given.value.split(",")]
        if len(names) < 2 or not all(names):
            raise InputError(
                f"--classes {given.value}: expected two names or more in the order of the model's "
                "numbers, such as bad,good"
            )
        found[given.name] = names
    return found


def located(path: str, folder: Path) -> str:
    """How a study in a folder names a path that is given from here.

    Relative paths are made relative to the folder, others and names of the hub stay.
    """
    parts = split_path(path)
    if parts is not None:
        return "+".join(located(part, folder) for part in parts)
    local = Path(path).expanduser()
    if not local.exists():
        return path
    if Path(path).is_absolute() or path.startswith("~"):
        return os.path.abspath(local)
    return os.path.relpath(local, folder)


def as_name(text: str) -> str:
    """A text as the name of a study, of which folders are made."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return kept or "study"
