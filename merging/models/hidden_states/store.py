"""Hidden states that lower blocks of a model gave, within a limit of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, eq=False)
class Form:
    """What a block gives beside its hidden state.

    Attributes:
        kind: List or tuple; None where it gives the hidden state alone.
        others: The elements after the hidden state, tensors in main memory.
    """

    kind: type | None = None
    others: tuple[torch.Tensor | None, ...] = ()

    def around(self, state: torch.Tensor) -> Any:
        """What the block gives with a hidden state."""
        if self.kind is None:
            return state
        device = state.device
        copies = (each if each is None else each.to(device, copy=True) for each in self.others)
        return self.kind([state, *copies])


class StateKey(NamedTuple):
    """What a hidden state depends on.

    Attributes:
        tower: Name of the blocks' list.
        depth: Number of blocks before it.
        weights: Digest of the weights of these blocks.
        inputs: Digest of what the tower was given.
    """

    tower: str
    depth: int
    weights: bytes
    inputs: bytes


@dataclass(frozen=True, eq=False)
class KeptState:
    """A hidden state, and how the blocks before it were called.

    Attributes:
        state: The output of the last of these blocks, in main memory.
        calls: Digest of what each block was given beside the hidden state.
        forms: What each block gave beside it.
    """

    state: torch.Tensor
    calls: tuple[bytes, ...]
    forms: tuple[Form, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        others = {id(each): each for form in self.forms for each in form.others if each is not None}
        return self.state.nbytes + sum(each.nbytes for each in others.values())


class HiddenStore:
    """Keeps hidden states; those of other weights make room for those of the present ones.

    Args:
        limit: Bytes at most.

    Attributes:
        size: Bytes that are held.
        found: States that were asked for and found.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[StateKey, KeptState] = {}  # oldest first
        self._prefixes: dict[str, tuple[bytes, ...]] = {}
        self._stale: deque[StateKey] = deque()  # of other weights, oldest first
        self._stale_size = 0
        self.size = 0
        self.found = 0

    def use(self, tower: str, prefixes: Sequence[bytes]) -> None:
        """Say what the weights of a tower are now.

        Args:
            tower: Its name.
            prefixes: Digest of the weights of its first 0, 1, 2, ... blocks.
        """
        self._prefixes[tower] = tuple(prefixes)
        self._stale = deque(key for key in self._kept if not self._is_present(key))
        self._stale_size = sum(self._kept[key].nbytes for key in self._stale)

    def depths(self, tower: str) -> set[int]:
        """Depths at which there are states of a tower's present weights."""
        return {key.depth for key in self._kept if key.tower == tower and self._is_present(key)}

    def find(self, key: StateKey) -> KeptState | None:
        """What is kept under a key."""
        kept = self._kept.get(key)
        self.found += kept is not None
        return kept

    def has_room(self, size: int) -> bool:
        """Whether a state of ``size`` bytes can be kept if all of other weights go."""
        return self.size - self._stale_size + size <= self._limit

    def keep(self, key: StateKey, kept: KeptState) -> None:
        """Keep a state, where there is room for it; the oldest of other weights go first.

        What there is of the present weights stays: items come in the same order in every trial, so
        the oldest of them is the one that is needed next.
        """
        size = kept.nbytes
        if key in self._kept or not self.has_room(size):
            return
        while self.size + size > self._limit:
            oldest = self._stale.popleft()
            self._stale_size -= self._kept[oldest].nbytes
            self.drop(oldest)
        self._kept[key] = kept
        self.size += size

    def drop(self, key: StateKey) -> None:
        """Forget a state of the present weights."""
        self.size -= self._kept.pop(key).nbytes

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self._stale.clear()
        self._stale_size = 0
        self.size = 0

    def _is_present(self, key: StateKey) -> bool:
        prefixes = self._prefixes.get(key.tower, ())
        return key.depth < len(prefixes) and prefixes[key.depth] == key.weights
