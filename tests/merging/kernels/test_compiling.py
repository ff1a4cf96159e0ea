"""Kernels are compiled at their first use, which a line at a terminal says."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from mergesearch.merging.kernels.numba_kernel import COMPILING, compiled

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


USED = """
import numpy as np
from numba.core.registry import CPUDispatcher
from mergesearch.merging import Field
from mergesearch.merging.kernels import combine, numba_kernel
kernels = [one for one in vars(numba_kernel).values() if isinstance(one, CPUDispatcher)]
assert len(kernels) > 5 and not any(kernel.overloads for kernel in kernels)
combine(np.ones(4, "f4"), np.ones((1, 4), "f4"), Field.constant(4, [2]), "delta", np.empty(4, "f4"))
print(*[kernel.py_func.__name__ for kernel in kernels if kernel.stats.cache_hits])
"""


def test_a_process_loads_the_kernels_that_it_calls_and_no_others() -> None:
    for _ in range(2):  # the first may have to compile them, with all that they call
        ran = subprocess.run([sys.executable, "-c", USED], capture_output=True, text=True)
        assert not ran.returncode, ran.stderr
    assert ran.stdout.split() == ["_combine"]


_NUMBERS = types.Array(types.float32, 1, "C")


def doubling() -> Any:
    """A kernel that nobody has called."""

    @compiled(types.float32(types.float32))
    def doubled(number: float) -> float:
        return number + number

    return doubled


def test_a_kernel_is_compiled_for_its_signatures_alone() -> None:
    kernel = doubling()
    assert not kernel.overloads
    assert kernel(np.float32(2)) == 4
    assert kernel(3) == 6  # converted, not compiled for whole numbers
    assert [*kernel.overloads] == [(types.float32,)]
    with pytest.raises(TypeError, match="No matching definition"):
        kernel("text")


def test_one_of_several_signatures_is_chosen() -> None:
    @compiled([types.int64(types.int64), types.float64(types.float64)])
    def same(number: float) -> float:
        return number

    assert isinstance(same(0.5), float)
    assert isinstance(same(1), int)


def test_a_kernel_that_another_calls_has_its_own_signature_too() -> None:
    kernel = doubling()

    @compiled(types.void(_NUMBERS))
    def all_doubled(numbers: Any) -> None:
        for index in range(numbers.size):
            numbers[index] = kernel(np.float64(numbers[index]))

    numbers = np.arange(3, dtype=np.float32)
    all_doubled(numbers)
    assert numbers.tolist() == [0, 2, 4]
    assert [*kernel.overloads] == [(types.float32,)]


def test_threads_that_come_first_at_once_share_one_kernel() -> None:
    kernel = doubling()
    barrier = Barrier(4)

    def first(number: int) -> float:
        barrier.wait()
        return float(kernel(np.float32(number)))

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(first, range(4))] == [0, 2, 4, 6]
    assert isinstance(kernel, numba.core.registry.CPUDispatcher)
    assert len(kernel.overloads) == 1
