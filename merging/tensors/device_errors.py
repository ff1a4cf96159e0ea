"""Errors of devices: out of memory, and those after which a process cannot use its device again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

#: ``memory``: a smaller batch may fit. ``broken``: CUDA refuses all further work of the process.
DeviceError = Literal["memory", "broken"]

_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
_BROKEN = re.compile(
    r"(CUDA|HIP|NCCL) error:|cuda runtime error|device-side assert|illegal memory access|"
    r"unspecified launch failure|uncorrectable (ECC|NVLink)|"
    r"(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
#: Errors of one call, which leave the device as it was (CUDA runtime API, "Error handling").
_OF_ONE_CALL = re.compile(
    r"CUDA error: (invalid (argument|configuration argument|device function|value)|"
    r"no kernel image|operation not (supported|permitted)|too many resources requested|"
    r"feature is not (yet )?implemented)"
)
#: A kernel found a wrong index or probability: often the fault of what it was given.
_ASSERTION = "device-side assert"


def device_error(error: BaseException) -> DeviceError | None:
    """The kind of device error that an exception, or one of those behind it, stands for."""
    kinds = [_kind(each) for each in _chain(error)]
    return "broken" if "broken" in kinds else "memory" if "memory" in kinds else None


def is_assertion(message: str) -> bool:
    """Whether a kernel refused what it was given."""
    return _ASSERTION in message


def _kind(error: BaseException) -> DeviceError | None:
    text = str(error)
    # torch.OutOfMemoryError is a RuntimeError; messages of programs are other exceptions.
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _MEMORY.search(text) is not None
    ):
        return "memory"
    if _MEMORY.search(text) or _OF_ONE_CALL.search(text):
        return None
    return "broken" if _BROKEN.search(text) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


__all__ = ["DeviceError", "device_error", "is_assertion"]
