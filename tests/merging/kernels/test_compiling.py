"""A line at a terminal says that kernels are compiled, and none where a cache has them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from mergesearch.merging.kernels.numba_kernel import COMPILING

COMPILE_TWO = """
import numba
from mergesearch.merging.kernels import numba_kernel
print("loaded", flush=True)
numba.njit("float64(float64)")(lambda x: x + 1)
numba.njit("float64(float64)")(lambda x: x + 2)
"""


def errors_at(terminal: bool) -> str:
    """What a process writes to its standard error when it compiles two functions."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as shown:
        subprocess.run([sys.executable, "-c", COMPILE_TWO], stderr=writer, check=True)
        os.write(writer, b"end\n")
        os.close(writer)
        text = b""
        while b"end" not in text:
            text += shown.read(1 << 12)
        return text.decode()


def test_it_is_said_once_and_only_at_a_terminal() -> None:
    # The first run of an installation compiles when it loads the kernels, later ones do not.
    assert errors_at(terminal=True).splitlines() == [COMPILING, "end"]
    assert errors_at(terminal=False).splitlines() == ["end"]
