"""Whether a model computes anything from the output of a block before the next block runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Sees whether anything is computed from a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False
        self._running = False
        self._memory = 0

    def start(self, tensor: torch.Tensor) -> None:
        """Watch a tensor's memory from now on."""
        self._memory = tensor.untyped_storage().data_ptr()
        self._running = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no more."""
        if self._running:
            self._running = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = _tensors_in([args, kwargs or {}])
        self.seen |= any(each.untyped_storage().data_ptr() == self._memory for each in given)
        return func(*args, **(kwargs or {}))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
