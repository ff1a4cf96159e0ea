"""Reads a study file and checks what can be checked without checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging import InputError
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
    return resolve(checked_study(data, str(path)), path.resolve().parent)


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a study file as plain data.

    Raises:
        InputError: If it cannot be read, or is no YAML mapping.
    """
    try:
        text = path.read_text()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: expected a study file, received: {reason}; see `mergesearch run --help`"
        ) from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: expected YAML, received: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys, received {type(data).__name__}")
    return data


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
