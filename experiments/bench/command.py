"""What ``mergesearch --help`` costs: user and system CPU seconds of the whole process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

REPEATS = 5


def cpu_seconds(*arguments: str) -> float:
    """CPU seconds of one call of the command line; the smallest of a few."""
    best = float("inf")
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "mergesearch", *arguments], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def main() -> None:
    """Print help's cost beside that of a bare interpreter."""
    figures = {
        "help": round(cpu_seconds("--help"), 3),
        "ls strategies": round(cpu_seconds("ls", "strategies"), 3),
    }
    print("command line (CPU seconds)")
    for name, seconds in figures.items():
        print(f"  mergesearch {name:<14} {seconds:.3f}")
    print(json.dumps({"command": figures}))


if __name__ == "__main__":
    main()
