"""Every architecture is checked, merged, loaded again and searched, as its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.structure import NAMES
from tests.architectures.table import PAGE, STRUCTURE, rows_of
from tests.architectures.trial import NOT_APPLICABLE, STEPS, WORKS, try_out

ROWS = rows_of(PAGE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_the_table_says(name: str, tmp_path: Path) -> None:
    assert try_out(name, tmp_path) == dict(zip(STEPS, ROWS[name][STRUCTURE:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_all_that_applies_works(name: str) -> None:
    assert {*ROWS[name][STRUCTURE:]} <= {WORKS, NOT_APPLICABLE}
