"""The tests that are marked ``gpu``."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.gpu_check.check import Figure, Machine, Skipped

ROOT = Path(__file__).parents[2]

#: pytest's exit code where no test was chosen.
_NOTHING = 5


def run(machine: Machine) -> Sequence[Figure]:
    """How many passed, and how many skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, machine.tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=machine.seconds,
        check=False,
    )
    if done.returncode == _NOTHING:
        raise Skipped(f"no test in {machine.tests} is marked gpu")
    return [figure_of(done.stdout, done.returncode)]


def figure_of(output: str, code: int) -> Figure:
    """What pytest's last line says."""
    found = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)",
                                                            _last_line(output))}  # fmt: skip
    counts = ", ".join(f"{count} {what}" for what, count in found.items())
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    names = f": {', '.join(failed)}" if failed else ""
    return Figure("pytest -m gpu", f"{counts or 'no summary'}{names}", "none fails", code == 0)


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else ""
