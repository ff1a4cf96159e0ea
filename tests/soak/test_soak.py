"""Ten minutes of the soak, with a seed of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import soak


@pytest.mark.slow
def test_a_soak_finds_nothing(tmp_path: Path) -> None:
    outcome = soak(10, seed=1, root=tmp_path)
    assert outcome.findings == []
    assert outcome.counts["kills"] > 0
    assert outcome.counts["studies"] > 0
