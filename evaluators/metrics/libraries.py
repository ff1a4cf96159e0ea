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


def check_library(name: str, where: str) -> None:
    """Refuse a metric whose library is missing.

    Raises:
        InputError: In one line.
    """
    top = name.partition(".")[0]
    if find_spec(top) is None:
        raise InputError(
            f"{where}: expected the library {top}, which computes this metric, found none; install "
            f"it: pip install {top}"
        )
