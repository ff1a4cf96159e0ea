"""Removal of secrets from text that leaves the driver: logs, trackers, errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

#: What stands where a secret stood.
HIDDEN = "***"
#: Environment variables with such names hold secrets.
SECRET_NAMES = ("_TOKEN", "_KEY", "PASSWORD", "_SECRET")
#: Shorter values are no secrets, and would match everywhere.
MIN_SECRET = 8

# A password may hold "/" and "@" (databases accept that), so it ends at the last "@" before a
# space; a number before a "/" is a port.
_URL_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*):(?!\d{1,5}/)\S+@")
_HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}")


def redact(text: str) -> str:
    """Replace secrets in ``text`` by ``***``.

    Secrets are passwords in URLs, tokens of the hub, and values of environment variables whose
    names say so. Redact plain strings, before encoding: JSON escapes what a secret may hold.
    """
    return _redact(text, _secrets())


def redacted(value: Any) -> Any:
    """Copy JSON-like data with every string redacted, keys included."""
    return _redacted(value, _secrets())


def _redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    # What both patterns must contain is looked for first: every text of every event comes here.
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    if "hf_" in text:
        text = _HUB_TOKEN.sub(HIDDEN, text)
    return text


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redact(str(key), secrets): _redacted(inner, secrets) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(inner, secrets) for inner in value]
    return value


def _secrets() -> list[str]:
    """Values to hide, as they are and as URLs write them.

    The longest come first, since one may contain another.
    """
    values = {
        value
        for name, value in os.environ.items()
        if name.upper().endswith(SECRET_NAMES) and len(value) >= MIN_SECRET and not value.isspace()
    }
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
