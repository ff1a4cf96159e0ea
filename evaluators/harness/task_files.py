"""Task files of a folder, and all that they include: read as data before the harness reads them.

The harness follows ``include`` to files of any name in any folder, and imports what a value with
the tag ``!function`` names, also where a later key replaces the value. So tags are looked for in
the stream of the parser, where no escape or directive hides them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.merging.foreign.yaml_text import YAML_LIMIT, local_tags, parse_tagged_yaml

FUNCTION = "!function"


@dataclass(frozen=True)
class TaskFile:
    """A file that the harness reads.

    Attributes:
        path: Where it is.
        names_code: Whether it names a function, which reading it imports.
        includes: Files that it is completed by.
    """

    path: Path
    names_code: bool
    includes: tuple[Path, ...]


def task_files(folder: Path, where: str) -> Iterator[TaskFile]:
    """The task files of a folder and below, and those that they include, each once.

    Args:
        folder: Of the task files.
        where: The evaluator, as errors name it.

    Raises:
        InputError: If there is no such folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise InputError(
            f"{where}.include_path: expected a folder of task files, found no {path_shown(folder)}"
        )
    waiting = sorted(folder.rglob("*.yaml"), reverse=True)
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        whole = os.path.realpath(path)
        if whole not in seen:
            seen.add(whole)
            found = _read(path)
            waiting += found.includes
            yield found


def names_code(folder: Path) -> bool:
    """Whether a task file of a folder names a function.

    Files that cannot be read are refused when the tasks are loaded, before the harness reads any.
    """
    try:
        return any(file.names_code for file in task_files(folder, "evaluators"))
    except InputError:
        return False


def _read(path: Path) -> TaskFile:
    what = "a task file of lm_eval"
    text = read_text(path, YAML_LIMIT, what=what)
    where = path_shown(path)
    data = parse_tagged_yaml(text, where)
    includes = tuple(_included(path, each, where) for each in _includes(data))
    return TaskFile(path, FUNCTION in local_tags(text), includes)


def _includes(value: Any) -> Iterator[Any]:
    """What stands under a key ``include``, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from _includes(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == "include":
                yield from each if isinstance(each, list) else [each]
            else:
                yield from _includes(each)


def _included(path: Path, name: Any, where: str) -> Path:
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{where}: include: expected the name of a file, received another value")
    return path.parent / name
