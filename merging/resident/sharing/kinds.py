"""How memory of a device is shared between processes, by the kind of device.

CUDA (read in torch 2.13, ``torch/multiprocessing/reductions.py``): a handle stands for the whole
block of ``cudaMalloc``, so one tensor is shared and never one for each parameter. The exporting
process has to outlive the importing ones. With ``expandable_segments`` torch passes file
descriptors between processes instead, which containers forbid (pytorch issue 165685); it has to be
off on both sides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError
from mergesearch.merging.resident.sharing.protocol import Kind
from mergesearch.merging.tensors.accelerator import device_module

if TYPE_CHECKING:
    import torch

#: Environment variables with settings of torch's allocator: the present name and the older one.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: Attribute of a device's module (such as ``torch.cuda``) that says that the device computes in
#: main memory, so that mapping a file is sharing.
HOST_MEMORY = "computes_in_host_memory"

_EXPANDABLE = re.compile(r"\s*expandable_segments\s*:\s*(\w+)\s*", re.IGNORECASE)
#: Positions among the arguments of ``rebuild_cuda_tensor`` that differ between tensors of one
#: dimension that start anywhere: offset, handle and bytes of the block, counter and event.
_OFFSET = 3
_BLOCK = slice(7, 10)
_COUNTER = slice(11, 15)


class SharedKind(Protocol):
    """Memory of one kind."""

    def allocate(self, size: int, device: str, path: Path) -> torch.Tensor:
        """A uint8 tensor ``(size,)`` on a device, which other processes can map.

        Args:
            size: Bytes.
            device: As torch names it.
            path: A file for kinds that need one.
        """

    def payload(self, memory: torch.Tensor, path: Path) -> tuple[Any, ...]:
        """What another process needs to map it; plain values."""

    def open(self, payload: tuple[Any, ...], size: int, device: str) -> torch.Tensor:
        """The memory of another process, as a tensor on the same card under its name here."""


class CudaIpc:
    """Memory of a CUDA card, by an IPC handle."""

    def allocate(self, size: int, device: str, path: Path) -> torch.Tensor:
        """A tensor in a block of the caching allocator."""
        import torch

        refuse_expandable_segments(os.environ)
        return torch.empty(size, dtype=torch.uint8, device=device)

    def payload(self, memory: torch.Tensor, path: Path) -> tuple[Any, ...]:
        """The IPC handle with its offset, counter and event."""
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize(memory.device)  # others see no event of an upload that still runs
        _, arguments = reduce_tensor(memory)  # type: ignore[no-untyped-call]
        return plain_payload(arguments)

    def open(self, payload: tuple[Any, ...], size: int, device: str) -> torch.Tensor:
        """The block of the holder, with the card's index in this process."""
        import torch
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        refuse_expandable_segments(os.environ)
        index = torch.device(device).index
        here = torch.cuda.current_device() if index is None else index
        arguments = rebuild_arguments(payload, size, here)
        memory: torch.Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
        return memory


class MappedFile:
    """A file, mapped by all, for devices that compute in main memory."""

    def allocate(self, size: int, device: str, path: Path) -> torch.Tensor:
        """A new file of the holder."""
        memory = np.memmap(path, dtype=np.uint8, mode="w+", shape=(size,))
        return _on(memory, device)

    def payload(self, memory: torch.Tensor, path: Path) -> tuple[Any, ...]:
        """The path."""
        return (str(path),)

    def open(self, payload: tuple[Any, ...], size: int, device: str) -> torch.Tensor:
        """The file, read-only: a stray write ends the process instead of the others' weights."""
        return _on(np.memmap(payload[0], dtype=np.uint8, mode="r", shape=(size,)), device)


KINDS: Mapping[Kind, SharedKind] = {"cuda_ipc": CudaIpc(), "file": MappedFile()}


def kind_of(device: str) -> Kind:
    """How memory of a device is shared.

    Raises:
        InputError: If it cannot be.
    """
    import torch

    type_ = torch.device(device).type
    if type_ == "cuda":
        return "cuda_ipc"
    if type_ == "cpu" or getattr(device_module(device), HOST_MEMORY, False):
        return "file"
    raise InputError(
        f"workers: expected a device whose memory processes can share, received {type_}; set "
        "workers.per_gpu: 1"
    )


def plain_payload(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of the arguments of ``rebuild_cuda_tensor`` is not the same for every arena."""
    return (arguments[_OFFSET], *arguments[_BLOCK], *arguments[_COUNTER])


def rebuild_arguments(payload: tuple[Any, ...], size: int, index: int) -> tuple[Any, ...]:
    """The arguments of ``rebuild_cuda_tensor`` for a uint8 tensor ``(size,)`` on card ``index``."""
    import torch

    offset, handle, block_size, block_offset, *counter = payload
    kind = (torch.Tensor, torch.Size([size]), (1,), offset, torch.storage.TypedStorage, torch.uint8)
    return (*kind, index, handle, block_size, block_offset, False, *counter)


def without_expandable_segments(setting: str) -> str:
    """A setting of torch's allocator, with expandable segments off."""
    kept = [part for part in setting.split(",") if part.strip() and not _EXPANDABLE.fullmatch(part)]
    return ",".join([*kept, "expandable_segments:False"])


def turn_off_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Change settings of a process that has not used its card yet."""
    for name in ALLOCATOR_VARIABLES:
        if name in environment:
            environment[name] = without_expandable_segments(environment[name])


def refuse_expandable_segments(environment: Mapping[str, str]) -> None:
    """Refuse settings under which handles do not reach other processes.

    Raises:
        InputError: If expandable segments are on.
    """
    for name in ALLOCATOR_VARIABLES:
        found = [_EXPANDABLE.fullmatch(part) for part in environment.get(name, "").split(",")]
        if any(match is not None and match[1].lower() != "false" for match in found):
            raise InputError(
                f"{name}: expected expandable_segments:False where processes share a card, "
                f"received {environment[name]!r}; change it, or set workers.per_gpu: 1"
            )


def _on(memory: npt.NDArray[np.uint8], device: str) -> torch.Tensor:
    """Main memory as a tensor of a device that computes there; the tensor keeps it alive."""
    import torch

    make = torch._C._construct_storage_from_data_pointer
    tensor = torch.empty(0, dtype=torch.uint8, device=device)
    storage = make(memory.ctypes.data, tensor.device, memory.size)
    tensor.set_(storage, 0, (memory.size,), (1,))
    tensor.mapping = memory  # type: ignore[attr-defined]
    return tensor
