"""Where heavy work on tensors is done: in main memory, or on an accelerator in allowed pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any

from mergesearch.merging.tensors.accelerator import ACCELERATOR, device_module, device_or_cpu

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.memo import Memo
    from mergesearch.merging.tensors.source import TensorSource

#: Share of an accelerator's free memory that preparing may use unless it is told.
SHARE = 0.8


@dataclass(frozen=True)
class Place:
    """A device to prepare on, and how much of its memory may be used at once.

    Attributes:
        device: As torch names it.
        allowance: Bytes, or None for no limit.
        lock: Of an accelerator's :attr:`turn`.
    """

    device: str = "cpu"
    allowance: int | None = None
    lock: Any = field(default_factory=RLock, repr=False, compare=False)

    @property
    def turn(self) -> AbstractContextManager[Any]:
        """Held by the one thread that works on an accelerator, while others read and write.

        In main memory threads work at once, each on a core of its own.
        """
        return nullcontext() if self.is_host else self.lock

    @property
    def is_host(self) -> bool:
        """Whether it is main memory."""
        return self.device == "cpu"

    def fits(self, size: float) -> bool:
        """Whether so many bytes may be used at once."""
        return self.allowance is None or size <= self.allowance

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """The device to work on this tensor: its own if that is an accelerator, else this one."""
        import torch

        return tensor.device if tensor.device.type != "cpu" else torch.device(self.device)

    def room(self, size: int, *, held: int = 0, least: int = 1) -> int:
        """How many items of ``size`` bytes fit beside ``held`` bytes, at least ``least``."""
        if self.allowance is None:
            return 1 << 62
        return max(least, (self.allowance - held) // max(size, 1))

    def pieces(self, tensor: torch.Tensor, copies: int) -> Iterator[torch.Tensor]:
        """The elements of a tensor on the device, as many at a time as may be there.

        Args:
            tensor: Of any shape.
            copies: Bytes that are needed for each byte of a piece.
        """
        flat = tensor.detach().reshape(-1)
        device = self.device_of(tensor)
        step = self.room(copies * flat.element_size())
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].to(device)


#: Main memory, without a limit.
HOST = Place()


@dataclass(frozen=True)
class PlacedSource:
    """A tensor source together with where heavy work on it is done."""

    origin: TensorSource
    place: Place

    @property
    def name(self) -> str:
        """Short name of the source."""
        return self.origin.name

    @property
    def names(self) -> Sequence[str]:
        """Names of its tensors."""
        return self.origin.names

    @property
    def memo(self) -> Memo | None:
        """That of the source."""
        return self.origin.memo

    @property
    def identity(self) -> str:
        """That of the source."""
        return self.origin.identity

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.origin.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, where the source has it."""
        return self.origin.read(name)


def place_of(source: TensorSource) -> Place:
    """Where heavy work on a source is done; sources that pass on another's are followed to it."""
    current: object = source
    while current is not None:
        if isinstance(current, PlacedSource):
            return current.place
        current = getattr(current, "origin", None)
    return HOST


def place_here(device: str = ACCELERATOR, allowance: int | None = None) -> Place:
    """A place on this machine: its accelerator if it has one, else main memory.

    Args:
        device: Another choice, as torch names it.
        allowance: Bytes that may be used at once; by default most of what is free on an
            accelerator, and no limit in main memory.
    """
    chosen = device_or_cpu(device)
    if allowance is None and chosen != HOST.device:
        module = device_module(chosen)
        if hasattr(module, "mem_get_info"):
            free, _ = module.mem_get_info(chosen)
            allowance = int(SHARE * free)
    return Place(chosen, allowance)
