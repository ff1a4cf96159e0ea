"""What a storage's URL may be."""

from __future__ import annotations

from mergesearch.merging import InputError
from mergesearch.search.redact import redact


def database_url(location: str) -> str:
    """The URL with the driver that is installed: ``postgresql://`` means psycopg 3.

    Raises:
        InputError: If it is no database's URL.
    """
    scheme, found, rest = location.partition("://")
    if not found or scheme.startswith(("redis", "journal", "grpc")):
        raise InputError(
            "storage: expected a database's URL (postgresql://USER@HOST/NAME), received "
            f"{redact(location)}; "
            "only databases can refuse a second driver"
        )
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else location
