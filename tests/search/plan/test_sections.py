"""Checks across sections hold for every study that is planned, not only for files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergesearch.merging import InputError
from mergesearch.search.plan.planning import plan_study
from tests.search.studies import analytic, spec_of


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"strategy": {"name": "cma_es", "sigmas": 0.1}}, "strategy.sigmas: unknown option"),
        ({"storage": "postgresql://me:secret@db/merges"}, "received it in plain text in"),
        ({"storage": "redis://db"}, "only databases can refuse a second driver"),
        ({"base": "somewhere"}, "experts: expected both base and experts"),
    ],
)
def test_a_study_built_in_python_is_checked_like_a_file(
    sections: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        plan_study(spec_of(analytic(**sections), tmp_path))
    assert message in str(error.value)
    assert "secret" not in str(error.value)
