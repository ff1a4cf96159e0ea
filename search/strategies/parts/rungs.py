"""Rungs of items: how many items each has, and on which one a new configuration begins."""

from __future__ import annotations

from collections.abc import Iterator


def rungs_of(items: int, eta: int, least: int | None = None) -> list[int]:
    """Items of each rung: items / eta^k as long as that is ``least`` or more, then all items."""
    least = max(items // eta**2, 10) if least is None else least
    rungs = [items]
    while rungs[0] / eta >= least:
        rungs.insert(0, round(items / eta ** len(rungs)))
    return rungs


def bracket_rungs(rungs: int, eta: int) -> Iterator[int]:
    """The rungs on which new configurations begin, without end.

    Their proportions are those of Hyperband's brackets: bracket s of 0, ..., s_max has ⌈(s_max + 1)
    / (s + 1) · eta^s⌉ configurations (Li 2018, algorithm 1); the largest s comes first and begins
    lowest.
    """
    highest = rungs - 1
    while True:
        for s in reversed(range(rungs)):
            for _ in range(-(-rungs * eta**s // (s + 1))):
                yield highest - s
