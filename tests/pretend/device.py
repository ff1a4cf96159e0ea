"""The pretend card as a torch device, ``pretend``, and what tests do with its cards.

``import torch`` calls :func:`register` in every process that has the folder ``plugin`` on
PYTHONPATH: torch looks for backends among the entry points ``torch.backends`` (torch 2.5 and
later). It has to happen before the first backward pass, for which autograd counts the devices.

Environment:
    PRETEND_CARDS: Number of cards; 2 if not set.
    PRETEND_CARD_LIMIT: Bytes that each card has.
    PRETEND_CARD_BROKEN: ``CARD`` or ``CARD:OPERATIONS``: the card breaks after so many operations.
    CUDA_VISIBLE_DEVICES: As for CUDA; Ray sets it in its workers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.pretend.build import library

NAME = "pretend"
PLUGIN = Path(__file__).parent / "plugin"
NEVER = -1

_native: ctypes.CDLL | None = None


class Counters(ctypes.Structure):
    """What a card has done since its counters were reset.

    Attributes:
        operations: Kernels that a card would have launched, copies included.
        host_to_device, device_to_host: Bytes.
        synchronisations: How often the host would have waited for the card.
    """

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("operations", "host_to_device", "device_to_host", "synchronisations")
    )

    operations: int
    host_to_device: int
    device_to_host: int
    synchronisations: int


def is_registered() -> bool:
    """Whether this process has the device."""
    return _native is not None


def register() -> None:
    """Register the device; once in a process, and before its first backward pass."""
    global _native
    if _native is not None:
        return
    import torch

    from tests.pretend import torch_module

    _native = ctypes.CDLL(str(library()))
    _native.card_break_after.argtypes = (ctypes.c_int, ctypes.c_int64)
    _native.card_set_limit.argtypes = (ctypes.c_int, ctypes.c_int64)
    _native.card_counters.argtypes = (ctypes.c_int, ctypes.POINTER(Counters))
    _native.card_register()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, torch_module)
    torch.utils.generate_methods_for_privateuse1_backend()
    _read_environment()


def environment() -> dict[str, str]:
    """What a new process needs in its environment to have the device."""
    root = str(Path(__file__).parents[2])
    paths = [str(PLUGIN), root, os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class Cards:
    """What a test does with the cards of this process."""

    def count(self, cards: int) -> None:
        """Have so many cards; none is a machine without a GPU."""
        assert 0 <= cards <= _loaded().card_most()
        _loaded().card_set_count(cards)

    def limit(self, size: int, card: int = 0) -> None:
        """Give a card so many bytes; 0 takes the limit away."""
        _loaded().card_set_limit(card, size)

    def break_after(self, operations: int = 0, card: int = 0) -> None:
        """Let every operation on a card fail after so many more."""
        _loaded().card_break_after(card, operations)

    def live(self, card: int = 0) -> int:
        """Bytes that live tensors of a card take."""
        import torch

        return int(torch.accelerator.memory_allocated(card))

    def counters(self, card: int = 0) -> Counters:
        """A copy of a card's counters."""
        found = Counters()
        _loaded().card_counters(card, ctypes.byref(found))
        return found

    @contextmanager
    def counting(self, card: int = 0) -> Iterator[Counters]:
        """Count what a card does within the block; the counters are filled at its end."""
        _loaded().card_reset_counters(card)
        found = Counters()
        yield found
        _loaded().card_counters(card, ctypes.byref(found))

    @contextmanager
    def peak(self, card: int = 0) -> Iterator[list[int]]:
        """Measure the highest live bytes of a card within the block, beyond those at its beginning.

        The list holds them at the end of the block.
        """
        import torch

        before = self.live(card)
        torch.accelerator.reset_peak_memory_stats(card)
        found: list[int] = []
        yield found
        found.append(int(torch.accelerator.max_memory_allocated(card)) - before)

    def reset(self) -> None:
        """Mend all cards and take limits away."""
        for card in range(_loaded().card_most()):
            self.break_after(NEVER, card)
            self.limit(0, card)
            _loaded().card_reset_counters(card)
        _read_environment()


def _loaded() -> ctypes.CDLL:
    assert _native is not None, "the process was started without the pretend card"
    return _native


def _read_environment() -> None:
    from tests.pretend.torch_module import visible_cards

    cards = Cards()
    visible = visible_cards()
    cards.count(len(visible))
    for index in range(len(visible)):
        cards.limit(int(os.environ.get("PRETEND_CARD_LIMIT", 0)), index)
    broken, _, operations = os.environ.get("PRETEND_CARD_BROKEN", "").partition(":")
    if broken.isdigit() and int(broken) in visible:
        cards.break_after(int(operations or 0), visible.index(int(broken)))
