#!/usr/bin/env python3
"""Health check: exits 0 when every URL answers with the expected status within five seconds.

``answers URL ...`` expects 200; ``answers --status 401 URL`` expects a server that is up and
refuses strangers. The image has no curl or wget, and needs none.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from urllib.parse import urlsplit

SECONDS = 5.0


def status(url: str) -> int:
    """The status that ``url`` answers with; no redirect is followed."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "127.0.0.1", parts.port, timeout=SECONDS
    )
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status
    finally:
        connection.close()


def problem(url: str, expected: int) -> str | None:
    """What is wrong with ``url``, in one line, or None."""
    try:
        received = status(url)
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: expected {expected}, received {type(error).__name__}: {error}"
    return None if received == expected else f"{url}: expected {expected}, received {received}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="answers", description=__doc__)
    parser.add_argument("--status", type=int, default=200)
    parser.add_argument("urls", nargs="+", metavar="URL")
    arguments = parser.parse_args()
    problems = [line for url in arguments.urls if (line := problem(url, arguments.status))]
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
