"""Checks the URL of a study's storage."""

from __future__ import annotations

from mergesearch.merging import InputError
from mergesearch.search.redact import redact


def database_url(location: str) -> str:
    """The URL with the driver that is installed: ``postgresql://`` means psycopg 3.

    Raises:
        InputError: If it is not the URL of a database.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or scheme.startswith(("redis", "journal", "grpc")):
        raise InputError(
            "storage: expected a database's URL (postgresql://USER@HOST/NAME), received "
            f"{redact(location)}; only databases can refuse a second driver"
        )
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else location
