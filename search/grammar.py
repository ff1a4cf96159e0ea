"""Counts in sentences, with the right grammar."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 trial``, ``3 trials``: for nouns that take an s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def times(count: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
