"""Libraries of metrics that not everybody needs, imported when they are used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mergesearch.merging import InputError


@cache
def library(name: str) -> Any:
    """A module of a library that :func:`check_library` has found."""
    return import_module(name)


@cache
def is_installed(name: str) -> bool:
    """Whether a library is there, which is looked up once."""
    return find_spec(name) is not None


def check_library(name: str, where: str, *, extra: str | None = None) -> None:
    """Refuse a metric whose library is missing.

    Args:
        name: A module of the library.
        where: Key of the study file, for messages.
        extra: The extra of this package that brings it; None where all installations have it.

    Raises:
        InputError: In one line.
    """
    top = name.partition(".")[0]
    if find_spec(top) is None:
        source = top if extra is None else f"'mergesearch[{extra}]'"
        raise InputError(
            f"{where}: expected the library {top}, which computes this metric, found none; install "
            f"it: pip install {source}"
        )
