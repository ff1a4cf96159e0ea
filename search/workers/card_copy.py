"""Base and rows of a study on a card, as its workers read them where another process holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging.resident.sharing.copies import AttachedCopy, card_identity
from mergesearch.merging.resident.sharing.lifeline import is_alive
from mergesearch.merging.resident.sharing.protocol import ArenaHandle, Wanted
from mergesearch.search.workers.messages import Failure, Outcome
from mergesearch.search.workers.node_cache import node_cache

if TYPE_CHECKING:
    from mergesearch.merging.resident.arena import Arenas

#: Why nothing counts that a worker computed while the holder of its weights ended.
COPY_LOST = Failure("lost", "the weights on the card were lost with the process that held them")


class CardCopy:
    """The copy that a worker reads, from the handle that its card's holder gave out.

    Args:
        handle: Of the holder that lives now.
    """

    def __init__(self, handle: ArenaHandle) -> None:
        self._handle = handle
        self._attached: AttachedCopy | None = None

    def in_place_of(self, arenas: Arenas, device: str) -> Arenas:
        """Arenas that lie in the shared copy.

        Args:
            arenas: As mapped from this node's files.
            device: The card, as this process names it.

        Raises:
            SharingError: If the copy is of another arena or on another card, or if it is lost.
        """
        wanted = Wanted(card_identity(device), arenas.name, len(arenas.memory))
        self._attached = AttachedCopy(self._handle, wanted, device)
        return replace(arenas, memory=self._attached.memory)

    @property
    def is_lost(self) -> bool:
        """Whether its holder has died, so that nothing computed from it counts any more."""
        return not is_alive(Path(self._handle.lifeline))

    def checked(self, outcome: Outcome) -> Outcome:
        """An outcome that was computed from the copy; without its values if the copy is lost."""
        return Outcome(outcome.task, None, COPY_LOST, copy_lost=True) if self.is_lost else outcome


def lifelines() -> Path:
    """Where holders of this node say that they live; local to it, unlike a folder of arenas."""
    return node_cache().parent / "holders"
