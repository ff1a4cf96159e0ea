"""Cards that a study may be planned for: known ones by name, others by size, and those of here."""

from __future__ import annotations

from dataclasses import dataclass

from mergesearch.merging import InputError
from mergesearch.merging.tensors.accelerator import accelerator, device_module

#: Bytes that each process takes on a card beside its tensors: context, kernels, library handles.
#: 0.5 to 1 GB on CUDA, by driver and by the libraries that are loaded.
CONTEXT_BYTES = 800_000_000
#: Types of devices of which processes have such a context.
_WITH_CONTEXT = frozenset({"cuda", "xpu"})
#: Share of a card that is left free: the caching allocator cannot use every gap.
RESERVE = 0.03


@dataclass(frozen=True)
class PlannedCard:
    """A card that a study is planned for.

    Attributes:
        name: For people.
        total: Bytes that it has, as torch reports them.
        context: Bytes that each process takes there beside its tensors.
    """

    name: str
    total: int
    context: int = CONTEXT_BYTES

    @property
    def usable(self) -> int:
        """Bytes that may be planned with."""
        return int((1 - RESERVE) * self.total)


#: Known cards, and the GB (10^9 bytes) that torch reports of each: less than its name says where
#: error correction or the driver keep a part.
KNOWN_CARDS: dict[str, PlannedCard] = {
    name: PlannedCard(name, int(gigabytes * 1e9))
    for name, gigabytes in (
        ("t4-16", 15.6),
        ("v100-32", 34.1),
        ("l4-24", 23.6),
        ("a10g-24", 23.6),
        ("rtx3090-24", 25.3),
        ("rtx4090-24", 25.2),
        ("rtx5090-32", 33.7),
        ("a100-40", 42.3),
        ("l40s-48", 47.6),
        ("a6000-48", 50.9),
        ("a100-80", 84.9),
        ("h100-80", 84.9),
        ("h200-141", 150.1),
        ("b200-192", 191.5),
        ("mi300x-192", 206.1),
    )
}


def parse_card(text: str) -> PlannedCard:
    """A known card by its name, or any by its size in GB (10^9 bytes).

    Raises:
        InputError: If it is neither.
    """
    if text.lower() in KNOWN_CARDS:
        return KNOWN_CARDS[text.lower()]
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e6:
        raise InputError(
            f"--card: expected GB of memory or one of {', '.join(KNOWN_CARDS)}, received {text!r}"
        )
    return PlannedCard(f"{gigabytes:g} GB", int(gigabytes * 1e9))


def cards_here() -> list[PlannedCard]:
    """The cards of this machine as torch reports them, whoever made them."""
    kind = accelerator()
    if kind is None:
        return []
    module = device_module(kind)
    context = CONTEXT_BYTES if kind in _WITH_CONTEXT else 0
    found = [module.get_device_properties(index) for index in range(module.device_count())]
    return [PlannedCard(card.name, int(card.total_memory), context) for card in found]


def smallest_that_fits(size: int) -> str | None:
    """The known card with the least memory that has so many usable bytes."""
    fitting = [card for card in KNOWN_CARDS.values() if card.usable >= size]
    return min(fitting, key=lambda card: card.total).name if fitting else None
