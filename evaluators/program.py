"""Runs a program with limits of time and output, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mergesearch.merging.extensions.import_path import environment_of_programs

#: Bytes of standard output that are read.
OUTPUT_LIMIT = 16 * 2**20
#: Lines of standard error that are kept.
ERROR_LINES = 20
#: Seconds between SIGTERM and SIGKILL.
GRACE = 2.0


@dataclass
class ProgramResult:
    """How a program ended.

    Attributes:
        code: Its exit code, negative for a signal.
        output: Its standard output.
        problem: Why it did not start or was ended early; None where neither happened.
        errors: The last lines of its standard error.
    """

    code: int = 0
    output: str = ""
    problem: str | None = None
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERROR_LINES))

    @property
    def last_words(self) -> str:
        """The last line of its standard error that is not blank, to be appended to a message."""
        line = next((text.strip() for text in reversed(self.errors) if text.strip()), "")
        return f"; it says: {line[:200]}" if line else ""


def run_program(command: Sequence[str], text: str, timeout: float, folder: Path) -> ProgramResult:
    """Run a program to its end, in a process group of its own that leaves nothing behind.

    Args:
        command: Program and arguments.
        text: Its standard input.
        timeout: Seconds that it may take at most.
        folder: Where it runs.
    """
    result = ProgramResult()
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=folder,
            env=environment_of_programs(),
            start_new_session=True,
        )
    except OSError as error:
        result.problem = f"expected a program that starts, received {error.strerror or error}"
        return result
    output = bytearray()
    too_large = threading.Event()
    threads = [
        threading.Thread(target=_write, args=(process.stdin, text.encode()), daemon=True),
        threading.Thread(
            target=_read_output, args=(process.stdout, output, too_large), daemon=True
        ),
        threading.Thread(target=_read_errors, args=(process.stderr, result.errors), daemon=True),
    ]
    try:
        for thread in threads:
            thread.start()
        result.problem = _wait(process.pid, time.monotonic() + timeout, timeout, too_large)
    finally:
        _end_group(process)
    for thread in threads:
        # A process that left the group may keep the pipes open.
        thread.join(GRACE)
    if too_large.is_set():
        result.problem = result.problem or _too_large()
    result.code = process.returncode
    result.output = bytes(output).decode(errors="replace")
    return result


def _wait(number: int, deadline: float, timeout: float, too_large: threading.Event) -> str | None:
    """Wait for a process to end, and return what went wrong, if anything.

    The process is not reaped, so that its number stays that of its group.
    """
    pause = 0.001
    while os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if too_large.wait(pause):
            return _too_large()
        if time.monotonic() > deadline:
            return f"expected an answer within {timeout:g} s, received none; raise timeout"
        pause = min(2 * pause, 0.05)
    return None


def _too_large() -> str:
    return f"expected at most {OUTPUT_LIMIT} bytes of output, received more; print less"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group: by SIGTERM first, then by SIGKILL."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and _alive(process.pid):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _alive(number: int) -> bool:
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _write(pipe: IO[bytes], content: bytes) -> None:
    # A program need not read what it is given.
    with suppress(BrokenPipeError), pipe:
        pipe.write(content)


def _read_output(pipe: IO[bytes], output: bytearray, too_large: threading.Event) -> None:
    with pipe:
        while block := pipe.read1(65536):  # type: ignore[attr-defined]
            if len(output) + len(block) > OUTPUT_LIMIT:
                too_large.set()
                return
            output += block


def _read_errors(pipe: IO[bytes], errors: deque[str]) -> None:
    with pipe:
        while line := pipe.readline(65536):
            errors.append(line.decode(errors="replace"))
