"""Tests that need the pretend card, which only processes of ``python -m tests.pretend`` have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.merging.conftest import build_model, pico
from tests.pretend.device import Cards, is_registered
from tests.search.conftest import pico_items, pico_models

#: Elsewhere ``tests/test_pretend_card.py`` runs them, in a process of their own.
collect_ignore_glob = [] if is_registered() else ["test_*.py"]

__all__ = ["build_model", "cards", "pico", "pico_items", "pico_models"]


@pytest.fixture
def cards() -> Iterator[Cards]:
    """Two cards in order, without limits; what a test does to them is undone."""
    cards = Cards()
    cards.reset()
    yield cards
    cards.reset()
