"""Tasks of lm_eval among the data: names of tasks, and files that describe one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.merging.foreign.yaml_text import YAML_LIMIT, parse_tagged_yaml
from mergesearch.search.init.given import Given

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm_eval.

    Attributes:
        names: Of tasks and groups.
        folder: Of task files of the user's, as it was given.
    """

    names: tuple[str, ...]
    folder: str | None = None


def is_task(given: Given, task: str) -> bool:
    """Whether data are a task of lm_eval: a name that is no path, or a task file.

    Args:
        given: The data.
        task: What the models do; only language models have tasks.
    """
    path = Path(given.value)
    if task != "language":
        return False
    return path.suffix in SUFFIXES or not (path.exists() or path.suffix or "/" in given.value)


def read_tasks(given: Sequence[Given]) -> Tasks:
    """The tasks among the data.

    Raises:
        InputError: If a task file cannot be read, or they lie in several folders.
    """
    files = [one for one in given if Path(one.value).suffix in SUFFIXES]
    folders = sorted({str(Path(one.value).parent) for one in files})
    if len(folders) > 1:
        raise InputError(
            f"--data: expected task files of one folder, received {', '.join(folders)}; copy them "
            "into one"
        )
    names = (_named(one.value) if one in files else one.value for one in given)
    return Tasks(tuple(names), folders[0] if folders else None)


def _named(path: str) -> str:
    """The task or group that a file describes."""
    text = read_text(Path(path), YAML_LIMIT, what="a task file of lm_eval")
    data = parse_tagged_yaml(text, f"--data {path_shown(path)}")
    name = (data.get("task") or data.get("group")) if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(data.get("group"), str):
        name = data["group"]
    if not isinstance(name, str):
        raise InputError(
            f"--data {path_shown(path)}: expected a task file of lm_eval with a key task, received "
            "none; give items as CSV, JSONL or Parquet"
        )
    return name
