"""Batches of a bounded number of padded tokens, and plans that are kept between candidates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

#: Padded tokens of a forward pass on an accelerator, where the study states no number.
ACCELERATOR_TOKENS = 32_768
#: Plans that are kept, the least recently used of which goes first.
KEPT_PLANS = 64

Plan = TypeVar("Plan")


def item_batches(items: Any, size: int) -> Iterator[Any]:
    """Yield the items of each forward pass, in their order.

    Args:
        items: In memory (:class:`mergesearch.evaluators.by_item.Items`).
        size: Items of a forward pass.
    """
    for start in range(0, len(items.domains), size):
        yield items.rows(slice(start, start + size))


def token_limit(stated: int | None, device: str, halvings: int = 0) -> int | None:
    """Padded tokens of a forward pass at most, or None for no limit.

    Args:
        stated: What the study says.
        device: Type of the device; the CPU has no limit of its own, because its memory is that of
            the whole machine, and batches there stay what they were in earlier versions.
        halvings: How often memory ran out.
    """
    if stated is None and device == "cpu":
        return None
    return max((ACCELERATOR_TOKENS if stated is None else stated) >> halvings, 1)


def token_batches(lengths: Sequence[int], rows: int, tokens: int | None) -> list[slice]:
    """Divide rows, in their order, into batches.

    Every batch takes as many rows as both limits allow, and at least one.

    Args:
        lengths: Tokens of each row.
        rows: Rows of a batch at most.
        tokens: Tokens of a batch at most, where every row is as long as its longest; None means
            no limit.
    """
    batches = []
    start = 0
    width = 0
    for index, length in enumerate(lengths):
        wider = max(width, length)
        count = index - start
        if count and (count == rows or (tokens is not None and (count + 1) * wider > tokens)):
            batches.append(slice(start, index))
            start = index
            wider = length
        width = wider
    if lengths:
        batches.append(slice(start, len(lengths)))
    return batches


class KeptPlans(Generic[Plan]):
    """What was worked out for some objects, by their identity.

    A plan stays as long as its objects are alive, because it is kept together with them.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[Sequence[Any], Plan]] = OrderedDict()

    def get(self, objects: Sequence[Any], settings: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan for objects and settings, made when it is first asked for."""
        key = (settings, tuple(map(id, objects)))
        if key not in self._kept:
            self._kept[key] = (tuple(objects), make())
            if len(self._kept) > KEPT_PLANS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def plans(self) -> list[Plan]:
        """All plans that are kept."""
        return [plan for _, plan in self._kept.values()]

    def clear(self) -> None:
        """Forget all plans."""
        self._kept.clear()
