"""What an evaluation allocates, and how often it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that copy a number from the device and wait for it. In inference mode the two that
#: are called by name are seen, elsewhere the one below them.
WAITING = {"aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default"}


def peak_bytes(act: Callable[[], Any]) -> int:
    """The most memory that an action had from torch's allocator at any time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        act()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = 0
    highest = 0
    for _, size in sorted(events):
        live += size
        highest = max(highest, live)
    return highest


class Counter(TorchDispatchMode):
    """Counts operators by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operator and run it."""
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """Operators that wait for the device."""
        return sum(self.counts.get(name, 0) for name in WAITING)


@contextmanager
def batch_sizes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Collect the padded tokens of every forward pass."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()
