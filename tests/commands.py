"""Command lines that several tests start as a user would."""

from __future__ import annotations

import sys
from pathlib import Path


def run_command(study: Path, folder: Path, *more: str, progress: str = "plain") -> list[str]:
    """``mergesearch run``, in a process of its own."""
    run = [sys.executable, "-m", "mergesearch", "run", str(study), "--run", str(folder)]
    return [*run, "--progress", progress, *more]
