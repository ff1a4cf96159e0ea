"""Reads a study file and checks what can be checked without checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import name_shown
from mergesearch.merging.foreign.yaml_text import YAML_LIMIT, parse_yaml
from mergesearch.search.plan.sections import section_problems
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import all_of, apply_override, resolve, validate


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read, override (``a.b=c``), validate and resolve a study file.

    Raises:
        InputError: In one line, if anything is wrong with it.
    """
    data = read_sections(path)
    for override in overrides:
        apply_override(data, override)
    return resolve(checked_study(data, name_shown(str(path), 200)), resolved(path).parent)


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a study file as plain data.

    Raises:
        InputError: If it cannot be read, or is no YAML mapping.
    """
    where = name_shown(str(path), 200)
    try:
        text = read_text(path, YAML_LIMIT, what="a study file")
    except InputError as error:
        raise InputError(f"{error}; see `mergesearch run --help`") from None
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping of keys, received {type(data).__name__}")
    return Node(data, where).mapping()


def checked_study(data: Mapping[str, Any], where: str) -> StudySpec:
    """Validate the sections of a study, before paths are resolved; ``where`` begins messages.

    Raises:
        InputError: In one line, if anything is wrong with them.
    """
    spec = validate(data, where)
    problems = section_problems(spec)
    if problems:
        raise InputError(all_of(where, problems))
    return spec
