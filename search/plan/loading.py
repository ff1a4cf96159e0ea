"""loading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mergesearch.merging import InputError
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
    _check_names(spec, str(path))
    return resolve(spec, path.resolve().parent)


def _check_names(spec: StudySpec, where: str) -> None:
    """Checks across sections that need no file: operator, strategy, sources."""
    from mergesearch.merging.operators import get_operator
    from mergesearch.search.strategies.table import check_options

    try:
        get_operator(spec.operator.name).complete(spec.operator.options)
        check_options(spec.strategy.name, spec.strategy.options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    _check_storage(spec.storage, where)
    if spec.special.vocabulary == "common":
        raise InputError(
            f"{where}: special.vocabulary: expected same, base or union in a study, whose items "
            "hold the base's token "
            "numbers, received common, which renumbers them"
        )
    if (spec.base is None) != (not spec.experts):
        missing = "base" if spec.base is None else "experts"
        raise InputError(
            f"{where}: {missing}: expected both base and experts (or neither, for analytic "
            "problems)"
        )


def _check_storage(url: str | None, where: str) -> None:
    """Refuse a password in plain text: the study is copied to the run folder, the database and the
    cluster.
    """
    if url is None:
        return
    from urllib.parse import urlsplit

    from mergesearch.search.redact import redact
    from mergesearch.search.spec.storage_url import database_url

    password = urlsplit(url).password
    if password and "${" not in password:
        raise InputError(
            f"{where}: storage: expected the password as ${{NAME}}, to be read from the "
            "environment, received it in "
            f"plain text in {redact(url)}; or leave it to PGPASSWORD or ~/.pgpass"
        )
    try:
        database_url(url)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
