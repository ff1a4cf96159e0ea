"""The command that resumes a run, as its user would type it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def resume_command(
    study: Path,
    folder: Path | None,
    pairs: Sequence[str],
    address: str | None = None,
    *,
    trust_log: bool = False,
) -> str:
    """The command that resumes a run, with what the user gave to the one that was interrupted.

    Args:
        study: The study file.
        folder: Run folder; None where it was not given.
        pairs: ``KEY=VALUE`` of every ``--set``.
        address: Of a cluster.
        trust_log: Whether recorded points are trusted.
    """
    words = ["mergesearch", "run", str(study)]
    words += [] if folder is None else ["--run", str(folder)]
    for pair in pairs:
        words += ["--set", pair]
    words += [] if address is None else ["--address", address]
    words += ["--trust-log"] if trust_log else []
    return shlex.join(words)
