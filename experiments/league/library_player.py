"""A library in a process and an environment of its own, as a contestant."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.running import ROOT
from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.seeding import default_sigma, known_merges

ENVIRONMENT = ROOT / ".venv-league"
PYTHON = ENVIRONMENT / "bin" / "python"
REQUIREMENTS = ROOT / "experiments" / "league" / "requirements.txt"


def install() -> None:
    """Make the environment of the libraries, unless it is there already."""
    done = ENVIRONMENT / ".installed"
    if done.is_file() and done.read_text() == REQUIREMENTS.read_text():
        return
    print(f"installing the libraries into {ENVIRONMENT.name}; once, some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in REQUIREMENTS.read_text().splitlines() if "torch==" in line)
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    done.write_text(REQUIREMENTS.read_text())


class _Server:
    """A process that serves one problem after the other: imports of libraries take seconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-m", "experiments.league.libraries"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected an answer of the library, its process ended ({message})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


#: This process's server, once it is started.
_SERVERS: list[_Server] = []


def close_servers() -> None:
    """End this process's server; the next library starts another."""
    while _SERVERS:
        _SERVERS.pop().close()


class LibraryPlayer:
    """Asks a library over a pipe.

    Args:
        library: A name in the table of libraries.
        problem: What is searched, in its own box.
        seed: Of the library.
    """

    def __init__(self, library: str, problem: Problem, seed: int) -> None:
        if not PYTHON.is_file():
            raise InputError(
                f"{ENVIRONMENT.name}: expected the environment of the libraries, found none; run "
                "`python -m experiments.league`, which makes it"
            )
        if not _SERVERS:
            _SERVERS.append(_Server())
            atexit.register(close_servers)
        self._problem = problem
        self._spent = 0.0
        self._call({"new": {"library": library, **self._task(seed)}})

    def ask(self, count: int) -> list[Suggestion]:
        """Up to ``count`` suggestions; fewer where the library waits for results."""
        found = []
        for _ in range(count):
            asked = self._call({"ask": True})
            if asked is None:
                break
            point = self._problem.lower + self._problem.width * np.array(asked[1])
            found.append(Suggestion(asked[0], point))
        return found

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell the results of suggestions."""
        for trial in trials:
            assert trial.losses is not None
            self._call({"tell": [trial.id, self._losses(trial)]})

    def best(self) -> list[Point]:
        """The library's recommendation, where it has one."""
        if self._problem.objectives > 1:
            return []
        point = self._call({"best": True})
        if point is None:
            return []
        return [self._problem.lower + self._problem.width * np.array(point)]

    def cpu_seconds(self) -> float:
        """CPU that the library has used since its start."""
        return self._spent

    def _losses(self, trial: TrialResult) -> list[float]:
        assert trial.losses is not None
        return [float(loss) for loss in self._problem.normalise(trial.losses)]

    def _task(self, seed: int) -> dict[str, Any]:
        problem = self._problem
        known = known_merges(problem)
        points = [((k.point - problem.lower) / problem.width).tolist() for k in known]
        return {
            "dim": problem.dim,
            "objectives": problem.objectives,
            "budget": problem.budget,
            "seed": seed,
            "start": points[0],
            "sigma": default_sigma(problem.dim),
            "points": points,
            "losses": [self._losses(k) for k in known],
        }

    def _call(self, message: dict[str, Any]) -> Any:
        try:
            answer = _SERVERS[0].call(message)
        except (RuntimeError, OSError):
            close_servers()
            raise
        if "error" in answer:
            raise RuntimeError(f"the library failed: {answer['error']}")
        self._spent = float(answer["cpu"])
        return answer["answer"]
