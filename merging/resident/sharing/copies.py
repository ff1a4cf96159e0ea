"""The two sides of a shared copy: the process that holds it, and those that read it.

In a plain process::

    held = HeldCopy("key.content", size, "cuda", folder)
    copy_bytes(arena, held.memory)
    handle = held.offer()                 # send it to another process of the same card
    ...
    attached = AttachedCopy(handle, Wanted(card_identity("cuda"), "key.content", size), "cuda")
    attached.memory                       # uint8 (size,), not to be written to
    attached.is_current()                 # whether the holder still lives
    attached.close()
"""

from __future__ import annotations

import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging.resident.sharing.kinds import KINDS, kind_of
from mergesearch.merging.resident.sharing.lifeline import Lifeline, is_alive
from mergesearch.merging.resident.sharing.protocol import (
    ArenaHandle,
    CardIdentity,
    CopyLostError,
    Wanted,
    check_handle,
)
from mergesearch.merging.tensors.accelerator import device_module

if TYPE_CHECKING:
    import torch


def card_identity(device: str) -> CardIdentity:
    """The card that a device of this process is."""
    import torch

    node = socket.gethostname()
    if torch.device(device).type == "cpu":
        return CardIdentity(node, "cpu")
    properties = device_module(device).get_device_properties(device)
    return CardIdentity(node, f"GPU {properties.uuid}")


class HeldCopy:
    """The memory that this process holds for others of its card.

    Args:
        arena: Names what will be in it.
        size: Bytes.
        device: As torch names it.
        folder: On this node; for the file that says that this process lives.

    Attributes:
        memory: uint8 ``(size,)``, to be filled before it is offered.

    Raises:
        InputError: If the device or its settings do not allow sharing.
    """

    def __init__(self, arena: str, size: int, device: str, folder: Path) -> None:
        self._arena = arena
        self._kind = kind_of(device)
        self._card = card_identity(device)
        self._generation = uuid.uuid4().hex
        self._lifeline = Lifeline(folder, self._generation)
        self._file = folder / f"{self._generation}.memory"
        self.memory: torch.Tensor = KINDS[self._kind].allocate(size, device, self._file)

    def offer(self) -> ArenaHandle:
        """What other processes map it by, once it is filled."""
        return ArenaHandle(
            generation=self._generation,
            card=self._card,
            arena=self._arena,
            size=self.memory.numel(),
            kind=self._kind,
            payload=KINDS[self._kind].payload(self.memory, self._file),
            lifeline=str(self._lifeline.path),
        )

    def close(self) -> None:
        """Let go: whoever has it mapped must read it no more."""
        del self.memory
        self._lifeline.close()
        self._file.unlink(missing_ok=True)


class AttachedCopy:
    """The memory of another process, mapped.

    Args:
        handle: From its holder.
        wanted: What it has to be.
        device: The card, as this process names it.

    Attributes:
        memory: uint8 ``(size,)``, not to be written to.

    Raises:
        SharingError: If it is something else.
        CopyLostError: If its holder has died.
        InputError: If settings of this process do not allow sharing.
    """

    def __init__(self, handle: ArenaHandle, wanted: Wanted, device: str) -> None:
        check_handle(handle, wanted)
        self._lifeline = Path(handle.lifeline)
        self._generation = handle.generation
        self.check_current()
        self.memory: torch.Tensor = KINDS[handle.kind].open(handle.payload, handle.size, device)
        self.check_current()  # else it may have been mapped as its holder ended

    def is_current(self) -> bool:
        """Whether the holder still lives: what was read until now is what it uploaded."""
        return is_alive(self._lifeline)

    def check_current(self) -> None:
        """Refuse a copy whose holder is gone.

        Raises:
            CopyLostError: If it is.
        """
        if not self.is_current():
            raise CopyLostError(
                f"shared weights: expected the holder of generation {self._generation} to live, "
                "found it gone; attach to the one that follows it"
            )

    def close(self) -> None:
        """Unmap it, as far as no tensor reads it any more."""
        device = self.memory.device
        del self.memory
        if device.type == "cuda":
            device_module(device).ipc_collect()
