"""Reads a study file and checks what can be checked without checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mergesearch.merging import InputError
from mergesearch.search.plan.sections import check_sections
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import apply_override, resolve, validate


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read, override (``a.b=c``), validate and resolve a study file.

    Raises:
        InputError: In one line, if anything is wrong with it.
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
    for override in overrides:
        apply_override(data, override)
    spec = validate(data, str(path))
    try:
        check_sections(spec)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return resolve(spec, path.resolve().parent)
