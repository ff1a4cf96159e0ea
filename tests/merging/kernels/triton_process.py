"""Cases that run in a process of their own, since Triton decides once how kernels run.

Whether its interpreter runs a kernel depends on ``TRITON_INTERPRET`` when Triton and the kernel's
module are imported, so neither can be changed in the process of the tests, nor may it: other tests
there import Triton too. One process runs all cases of a file; each is then a test.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[3]


@cache
def outcomes(
    module: str, names: tuple[str, ...], interpreted: bool, folder: Path
) -> dict[str, str]:
    """Name of each case -> what went wrong, or nothing; ``folder`` takes what is compiled."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", __name__, module, *names],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run(cases: Mapping[str, Callable[[], None]], names: Sequence[str]) -> dict[str, str]:
    result = {}
    for name in names:
        try:
            cases[name]()
            result[name] = ""
        except Exception:
            result[name] = traceback.format_exc()
    return result


if __name__ == "__main__":
    print(json.dumps(_run(importlib.import_module(sys.argv[1]).CASES, sys.argv[2:])))
