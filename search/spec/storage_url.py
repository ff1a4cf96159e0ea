"""Checks the URL of a study's storage."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import name_shown
from mergesearch.search.redact import redact


def split_url(url: str, key: str) -> SplitResult:
    """The parts of a URL.

    Args:
        url: The text.
        key: Key of the study file, for messages.

    Raises:
        InputError: If it is none, for example with half a bracket around its host.
    """
    try:
        parts = urlsplit(url)
        assert parts.port is None or parts.port  # raises where it is no number
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{key}: expected a URL, received {name_shown(redact(url))} ({error})"
        ) from None
    return parts


def database_url(location: str) -> str:
    """The URL with the driver that is installed: ``postgresql://`` means psycopg 3.

    Raises:
        InputError: If it is not the URL of a database.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or scheme.startswith(("redis", "journal", "grpc")):
        raise InputError(
            "storage: expected a database's URL (postgresql://USER@HOST/NAME), received "
            f"{name_shown(redact(location))}; only databases can refuse a second driver"
        )
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else location
