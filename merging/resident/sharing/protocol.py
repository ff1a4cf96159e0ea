"""What the holder of a card's weights and those that read them tell each other.

One process uploads base and rows of a study to a card and hands out a *handle*; others map the same
memory. Every life of a holder is a *generation*: what a handle of an earlier one points to is gone,
and whatever was computed from it afterwards counts for nothing. Nothing here knows torch or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergesearch.merging.errors import MergesearchError

#: ``cuda_ipc``: memory of a CUDA card. ``file``: a mapped file, where a device computes in main
#: memory.
Kind = Literal["cuda_ipc", "file"]
#: ``empty``: nothing was uploaded yet. ``loading``: a holder uploads. ``ready``: its handle may be
#: given out. ``gone``: the holder has died, and its users have to end.
State = Literal["empty", "loading", "ready", "gone"]


class SharingError(MergesearchError):
    """A handle was refused, or a step of the protocol is out of order."""


class CopyLostError(SharingError):
    """The process that held a copy is gone, and the copy with it."""


@dataclass(frozen=True)
class CardIdentity:
    """A card of the world: its node, and its number or UUID there."""

    node: str
    card: str

    def __str__(self) -> str:
        return f"{self.card} of {self.node}"


@dataclass(frozen=True)
class ArenaHandle:
    """What a process needs to map the copy of another.

    Attributes:
        generation: Names the life of the holder; never used twice.
        card: Where the copy lies.
        arena: Names the arena that was uploaded, by key and content.
        size: Its bytes.
        kind: How it is shared.
        payload: What the kind needs to map it.
        lifeline: A file that the holder keeps locked as long as it lives.
    """

    generation: str
    card: CardIdentity
    arena: str
    size: int
    kind: Kind
    payload: tuple[Any, ...]
    lifeline: str


@dataclass(frozen=True)
class Wanted:
    """What a process that attaches expects a copy to be."""

    card: CardIdentity
    arena: str
    size: int


def check_handle(handle: ArenaHandle, wanted: Wanted) -> None:
    """Refuse a handle to something else than what is wanted.

    Raises:
        SharingError: If card, arena or size differ.
    """
    for what, expected, received in (
        ("card", wanted.card, handle.card),
        ("arena", wanted.arena, handle.arena),
        ("number of bytes", wanted.size, handle.size),
    ):
        if expected != received:
            raise SharingError(
                f"shared weights: expected {what} {expected}, received a handle to {received}; "
                "workers attach to the holder of their own card and study only"
            )


class SharedCopy:
    """The state of one card's copy: empty -> loading -> ready -> gone -> loading ...

    Attributes:
        state: Where it is.
    """

    def __init__(self) -> None:
        self.state: State = "empty"
        self._handle: ArenaHandle | None = None
        self._past: set[str] = set()  # generations that are gone

    def begin(self) -> None:
        """Note that a new holder loads."""
        self._expect("begin", "empty", "gone")
        self.state = "loading"

    def finish(self, handle: ArenaHandle) -> None:
        """Note what the holder offers.

        Raises:
            SharingError: If the handle is that of an earlier holder.
        """
        self._expect("finish", "loading")
        if handle.generation in self._past:
            raise SharingError(
                f"shared weights: expected a new generation, received {handle.generation}, "
                "which is gone"
            )
        self._handle = handle
        self.state = "ready"

    def attach(self) -> ArenaHandle:
        """The handle that a worker may map.

        Raises:
            SharingError: If there is none now.
        """
        self._expect("attach", "ready")
        assert self._handle is not None
        return self._handle

    def end(self) -> None:
        """Note that the holder is gone, whatever it was about."""
        if self._handle is not None:
            self._past.add(self._handle.generation)
        self._handle = None
        self.state = "gone"

    def _expect(self, step: str, *states: State) -> None:
        if self.state not in states:
            raise SharingError(
                f"shared weights: expected {step} in state {' or '.join(states)}, received it in "
                f"state {self.state}"
            )
