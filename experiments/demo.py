"""Runs the demo, ``make demo``: from nothing to an exported model, by the commands of a user.

Builds the digits zoo, runs the sweep of ``experiments/0001-digits`` with two Ray workers, prints
the result table, draws the front, exports the winner, loads it back with transformers and scores it
again. A second call reuses the zoo and the finished run.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUDY = "experiments/0001-digits/study.yaml"
RUN = "runs/digits"
OUT = "runs/digits-best"


def main() -> None:
    """Run every step; stops at the first that fails, with its exit code."""
    step(sys.executable, "-m", "experiments.zoo.digits", shown="python -m experiments.zoo.digits")
    mergesearch("check", STUDY)
    mergesearch("run", STUDY)
    mergesearch("show", RUN, "--front")
    mergesearch("export", RUN, "--out", OUT, "--overwrite")
    print(f"\nFront:     {RUN}/front.png\nReport:    {RUN}/report.html\nModel:     {OUT}")
    print(f"Dashboard: .venv/bin/mergesearch dashboard {RUN}")


def mergesearch(*arguments: str) -> None:
    """One call of the command line."""
    step(
        sys.executable,
        "-m",
        "mergesearch",
        *arguments,
        shown=shlex.join(["mergesearch", *arguments]),
    )


def step(*command: str, shown: str) -> None:
    """Print and run one command."""
    print(f"\n$ {shown}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
