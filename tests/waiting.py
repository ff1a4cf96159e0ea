"""Waits of tests: for an event or the end of the process that should bring it, not for a clock.

Only the time limit of pytest ends a wait that nothing ends, so that a busy machine fails no test.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

#: Seconds that a command gets which takes a few; a machine that is busy needs many times as long.
PATIENT = 600


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen[Any] | None = None,
    explain: Callable[[], str] = str,
    pause: float = 0.1,
) -> None:
    """Return when the condition holds.

    Args:
        condition: What to wait for.
        process: Who brings it about; a process that has ended brings no more.
        explain: What to show if it has ended.
        pause: Seconds between two looks.

    Raises:
        AssertionError: If the process has ended and the condition does not hold.
    """
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended or condition(), explain()
        time.sleep(pause)
