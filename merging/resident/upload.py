"""Bytes from main memory to a device, by way of pinned staging.

Arenas are mapped files. A card can fetch only from pinned memory on its own, so each chunk is read
from the file into one of two pinned buffers, while the card fetches the one before from the other:
disk and bus work at the same time, and what is needed beside source and target is two chunks of
main memory and nothing on the card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergesearch.merging.kernels.torch_kernel import as_tensor
from mergesearch.merging.tensors.accelerator import device_module

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array

#: Bytes that travel at a time.
CHUNK = 1 << 26
#: Below so many bytes, pinned buffers cost more than they gain.
SMALL = 1 << 20


def copy_bytes(
    source: Array,
    target: torch.Tensor,
    told: Callable[[int], None] = lambda done: None,
    *,
    chunk: int = CHUNK,
) -> None:
    """Copy bytes ``(n,)`` in main memory to a device; they are there on return.

    Args:
        source: A mapped file, or an array.
        target: uint8 ``(n,)``.
        told: Called with the bytes that are on their way.
        chunk: Bytes that travel at a time.
    """
    host = as_tensor(source)
    size = host.numel()
    if size > SMALL and _has_streams(target):
        _copy_staged(host, target, told, min(chunk, size))
        return
    for start in range(0, size, chunk):
        target[start : start + chunk].copy_(host[start : start + chunk])
        told(min(start + chunk, size))


def _has_streams(target: torch.Tensor) -> bool:
    return target.device.type != "cpu" and hasattr(device_module(target.device), "stream")


def _copy_staged(
    host: torch.Tensor, target: torch.Tensor, told: Callable[[int], None], chunk: int
) -> None:
    import torch

    module = device_module(target.device)
    size = host.numel()
    staging = [torch.empty(chunk, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    fetched: list[torch.Event] = []  # by chunk
    stream = getattr(module, "Stream", torch.Stream)(target.device)
    stream.wait_stream(module.current_stream(target.device))  # which may still use this memory
    with module.stream(stream):
        for number, start in enumerate(range(0, size, chunk)):
            stop = min(start + chunk, size)
            if number >= len(staging):
                fetched[number - len(staging)].synchronize()
            staged = staging[number % len(staging)][: stop - start]
            staged.copy_(host[start:stop])
            target[start:stop].copy_(staged, non_blocking=True)
            fetched.append(stream.record_event())
            told(stop)
    stream.synchronize()
