"""Divides items by a hash of their content, in the same shares in every class and domain.

An item that occurs twice always lies on one side, and the order of the rows does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


def divide(
    contents: Sequence[str],
    strata: Sequence[Hashable],
    shares: Sequence[float],
    seed: int,
) -> npt.NDArray[np.intp]:
    """Part that each item belongs to ``(items,)``, from 0.

    Within a stratum, different contents are taken in the order of their hashes. Each part gets its
    share of them, and at least one where there are as many contents as parts; strata with fewer are
    divided as one. A content that occurs in several strata belongs to the first of them.

    Args:
        contents: What items are known by; equal ones stay together.
        strata: Class and domain of each item.
        shares: Share of each part, in any unit.
        seed: Changes the order of the hashes.
    """
    owner: dict[str, str] = {}
    for content, stratum in zip(contents, strata, strict=True):
        key = repr(stratum)
        owner[content] = min(owner.get(content, key), key)
    members: dict[str, list[str]] = {}
    for content, key in owner.items():
        members.setdefault(key, []).append(content)
    small = [key for key, chosen in members.items() if len(chosen) < len(shares)]
    members["rest"] = [content for key in small for content in members.pop(key)]
    part: dict[str, int] = {}
    for chosen in members.values():
        ordered = sorted(chosen, key=lambda content: _hash(content, seed))
        for index, count in enumerate(_counts(len(ordered), shares)):
            part |= dict.fromkeys(ordered[:count], index)
            ordered = ordered[count:]
    return np.array([part[content] for content in contents], dtype=np.intp)


def _counts(number: int, shares: Sequence[float]) -> list[int]:
    """How many of ``number`` contents each part gets, by largest remainders."""
    wanted = np.asarray(shares, dtype=np.float64) * number / sum(shares)
    counts = np.floor(wanted).astype(int)
    largest = np.argsort(counts - wanted, kind="stable")
    counts[largest[: number - int(counts.sum())]] += 1
    while number >= len(counts) and not counts.all():
        counts[int(counts.argmax())] -= 1
        counts[int(counts.argmin())] += 1
    return [int(count) for count in counts]


def _hash(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {content}".encode()).hexdigest()
