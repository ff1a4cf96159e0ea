"""Every architecture is checked, merged, loaded again and searched, as its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.denoisers import DENOISERS, INSTALLED
from tests.architectures.evaluations import kinds_of
from tests.architectures.structure import NAMES
from tests.architectures.table import PAGE, STRUCTURE, rows_of
from tests.architectures.trial import NOT_APPLICABLE, STEPS, WORKS, try_out

ROWS = rows_of(PAGE.read_text())
#: Rows of `make test`: a text, a sound, a picture, and a picture with a question.
QUICK = ("bert", "wav2vec2", "segformer", "blip2")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_the_table_says(name: str, tmp_path: Path) -> None:
    if name in DENOISERS and not INSTALLED:
        pytest.skip("needs diffusers")
    assert try_out(name, tmp_path) == dict(zip(STEPS, ROWS[name][STRUCTURE:], strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_some_of_what_the_table_says(name: str, tmp_path: Path) -> None:
    steps = ("check", "ties", "study")
    assert try_out(name, tmp_path, steps) == dict.fromkeys(steps, WORKS)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_applies_works(name: str) -> None:
    assert {*ROWS[name][STRUCTURE:]} <= {WORKS, NOT_APPLICABLE}


def test_hardly_a_model_is_scored_by_its_distance_alone() -> None:
    assert [name for name in NAMES if kinds_of(name) == ("distance",)] == ["vit_mae", "clap"]
