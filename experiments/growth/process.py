"""What this process holds and has spent, and functions measured in a process of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.running import ROOT


def anonymous_mb() -> float:
    """Anonymous memory of this process in MB: without files that are mapped."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def apart(module: str, *arguments: object) -> dict[str, Any]:
    """What a module prints as JSON in its last line, run in a process of its own."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
