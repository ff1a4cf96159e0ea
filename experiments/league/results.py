"""Results as lines of JSON: one is appended whole, and a cut one is played again."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.running import ROOT

FOLDER = ROOT / "runs" / "league"
RESULTS = FOLDER / "results.jsonl"


@dataclass(frozen=True)
class Result:
    """How a contestant did in a cell with a seed.

    Attributes:
        contestant, cell, seed: What was played.
        gap, gap_observed, cpu_ms, asked, volume, claimed, stopped, estimated: As in ``Outcome``;
            lines of earlier leagues have no ``estimated``.
        commit: What the strategies were: the commit, with ``+`` where files differed from it.
    """

    contestant: str
    cell: str
    seed: int
    gap: float
    gap_observed: float
    cpu_ms: float
    asked: int
    volume: float
    claimed: float
    stopped: str
    commit: str
    estimated: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """What was played."""
        return self.contestant, self.cell, self.seed


def read_results(path: Path = RESULTS) -> dict[tuple[str, str, int], Result]:
    """The results of a file; later ones replace earlier ones, and a cut line counts as none."""
    if not path.is_file():
        return {}
    found = [_parsed(line) for line in path.read_text().splitlines()]
    return {result.key: result for result in found if result is not None}


def append_result(result: Result, path: Path = RESULTS) -> None:
    """Append a result; a cut line before it is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(asdict(result)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def current_commit() -> str:
    """The short commit, with ``+`` where strategies or league differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "search/strategies", "experiments/league")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _parsed(line: str) -> Result | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        return Result(**fields)
    except (ValueError, TypeError):
        return None
