"""What a worker does with the copy of weights that another process holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.sharing.copies import HeldCopy
from mergesearch.merging.resident.sharing.protocol import CopyLostError, SharingError
from mergesearch.merging.resident.upload import copy_bytes
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.workers.card_copy import CardCopy
from mergesearch.search.workers.messages import Outcome
from tests.search.conftest import model_study
from tests.search.studies import spec_of


def test_values_count_as_long_as_the_holder_lives(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    template = plan_study(spec_of(model_study(pico_models, pico_items), tmp_path)).template
    arenas = open_arenas(template, tmp_path / "arenas")
    held = HeldCopy(arenas.name, len(arenas.memory), "cpu", tmp_path / "holders")
    copy_bytes(arenas.memory, held.memory)
    copy = CardCopy(held.offer())
    shared = copy.in_place_of(arenas, "cpu")
    assert np.array_equal(np.asarray(shared.memory), np.asarray(arenas.memory))
    assert replace(shared, memory=arenas.memory).packing is arenas.packing
    outcome = Outcome("1", None, None)
    assert copy.checked(outcome) is outcome
    with pytest.raises(SharingError, match="expected arena another"):
        copy.in_place_of(replace(arenas, name="another"), "cpu")
    held.close()
    lost = copy.checked(outcome)
    assert lost.copy_lost
    assert lost.failure is not None
    assert lost.failure.kind == "lost"
    with pytest.raises(CopyLostError):
        CardCopy(copy._handle).in_place_of(arenas, "cpu")
