"""Triton kernels have the bits of the CPU, run by Triton's interpreter in a process of its own.

Why a process of its own, see ``triton_process.py``; the cases are in ``triton_bits.py``.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from mergesearch.merging.kernels.triton_blocks import usable
from tests.merging.kernels.triton_bits import CASES
from tests.merging.kernels.triton_process import outcomes

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.xdist_group("triton"),
]


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "triton"
    failure = outcomes("tests.merging.kernels.triton_bits", tuple(CASES), True, folder)[case]
    assert not failure, failure


def test_without_its_interpreter_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not usable(torch.device("cpu"))
