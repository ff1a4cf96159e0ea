"""Which device errors are the fault of a card, and which of a task."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mergesearch.merging import MergesearchError
from mergesearch.merging.tensors.device_errors import device_error
from mergesearch.search.workers.backends.blame import Blame

LAUNCH = "CUDA error: unspecified launch failure"
ASSERTION = "CUDA error: device-side assert triggered"


def test_a_card_that_fails_two_tasks_is_bad_and_neither_task_is_at_fault() -> None:
    blame = Blame()
    assert not blame.add("1", "left", LAUNCH)
    assert blame.cards_of("1") == {"left"}
    assert not blame.is_bad("left")
    assert not blame.add("2", "left", LAUNCH)
    assert blame.is_bad("left")
    assert not blame.is_bad("right")


def test_a_task_that_breaks_two_cards_is_at_fault_and_the_cards_are_not() -> None:
    blame = Blame()
    blame.succeed("0", "right")
    assert not blame.add("1", "left", LAUNCH)
    assert blame.add("1", "right", LAUNCH)
    assert not blame.add("2", "left", LAUNCH)
    assert not blame.is_bad("left")
    assert not blame.is_bad("right")


def test_where_no_card_has_ever_answered_the_cards_are_at_fault_and_no_task_is() -> None:
    blame = Blame()
    assert not blame.add("1", "left", LAUNCH)
    assert not blame.add("1", "right", LAUNCH)
    assert not blame.add("2", "left", LAUNCH)
    assert not blame.add("2", "right", LAUNCH)
    assert blame.is_bad("left")
    assert blame.is_bad("right")


def test_two_bad_cards_do_not_make_a_task_guilty() -> None:
    blame = Blame()
    assert not blame.add("1", "left", LAUNCH)
    assert not blame.add("2", "right", LAUNCH)
    assert not blame.add("1", "right", LAUNCH), "that card had failed another task"
    assert blame.is_bad("right")


@pytest.mark.parametrize(("between", "message", "guilty"), [
    ("nothing", LAUNCH, False), ("another task", LAUNCH, True), ("nothing", ASSERTION, True),
])  # fmt: skip
def test_on_the_only_card_a_task_is_at_fault_if_the_card_works_for_others(
    between: str, message: str, guilty: bool
) -> None:
    blame = Blame()
    assert not blame.add("1", "only", message)
    if between == "another task":
        blame.succeed("2", "only")
    assert blame.add("1", "only", message) == guilty
    assert blame.is_bad("only") != guilty


def test_workers_without_cards_are_never_set_aside() -> None:
    blame = Blame()
    assert not blame.add("1", "", LAUNCH)
    assert not blame.add("2", "", LAUNCH)
    assert blame.add("1", "", LAUNCH), "it broke two workers"
    assert not blame.is_bad("")


def raised(*errors: Exception) -> Exception:
    """The last of some errors, each raised from the one before it."""
    for cause, error in pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize(("error", "kind"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "memory"),
    (RuntimeError("CUDA error: out of memory"), "memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "memory"),
    (MemoryError(), "memory"),
    (raised(torch.OutOfMemoryError("CUDA out of memory"), MergesearchError("a scorer")), "memory"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "broken"),
    (torch.AcceleratorError(f"{LAUNCH}\nCompile with TORCH_USE_CUDA_DSA"), "broken"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "broken"),
    (MergesearchError(f"the program ended with code 1; it says: RuntimeError: {LAUNCH}"), "broken"),
    (RuntimeError("CUDA error: invalid configuration argument"), None),
    (MergesearchError("a program ran out of memory"), None),
    (RuntimeError("shapes do not match"), None),
])  # fmt: skip
def test_errors_of_devices_are_told_from_others(error: Exception, kind: str | None) -> None:
    assert device_error(error) == kind
