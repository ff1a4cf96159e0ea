"""Triton kernels compile for three generations of GPUs: nothing fused, whole vectors loaded.

No device is needed. They are compiled in a process of their own; why, see ``triton_process.py``.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.merging.kernels.triton_process import outcomes
from tests.merging.kernels.triton_ptx import CASES, QUICK

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.xdist_group("triton"),
]

_MODULE = "tests.merging.kernels.triton_ptx"


@pytest.mark.parametrize("case", QUICK)
def test_merge_of_stored_experts(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "triton"
    failure = outcomes(_MODULE, tuple(QUICK), False, folder)[case]
    assert not failure, failure


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_every_kernel(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = tuple(name for name in CASES if name not in QUICK)
    folder = tmp_path_factory.getbasetemp() / "triton"
    failure = outcomes(_MODULE, names, False, folder)[case]
    assert not failure, failure
