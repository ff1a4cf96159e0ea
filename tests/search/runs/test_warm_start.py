"""``start: {run: ...}``: a study begins at a trial of another, in a finer space for example."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.runs.driver import run_study
from tests.search.conftest import model_study
from tests.search.studies import analytic, fingerprint, run_in, spec_of


def test_the_winner_of_another_run_is_measured_first_and_begun_at(tmp_path: Path) -> None:
    first = run_in(analytic("coarse", trials=60, strategy="cma_es"), tmp_path / "coarse")
    winner = first.trial(None)
    data = analytic(
        "fine",
        trials=20,
        strategy={"name": "sobol", "sigma": 1e-9},
        start={"run": str(tmp_path / "coarse")},
    )
    second = run_in(data, tmp_path / "fine")
    names = [record.name for record in second.log.records if record.kind == "anchor"]
    assert names[-1] == "winner of coarse"
    searched = [record.point for record in second.log.records if record.kind == "search"]
    np.testing.assert_allclose(searched, np.tile(winner.point, (len(searched), 1)), atol=1e-6)


def test_what_was_begun_at_is_recorded_and_needs_the_other_run_no_more(tmp_path: Path) -> None:
    run_in(analytic("coarse", trials=30, strategy="cma_es"), tmp_path / "coarse")
    data = analytic(
        "fine", trials=16, strategy="cma_es", start={"run": str(tmp_path / "coarse"), "trial": 7}
    )
    whole = run_in(data, tmp_path / "fine")
    assert "trial 7 of coarse" in [record.name for record in whole.log.records]
    journal = (tmp_path / "fine" / "journal.log").read_bytes().splitlines(keepends=True)
    (tmp_path / "fine" / "journal.log").write_bytes(b"".join(journal[: len(journal) // 2]))
    shutil.rmtree(tmp_path / "coarse")
    assert fingerprint(run_in(data, tmp_path / "fine")) == fingerprint(whole)


def test_a_finer_space_begins_at_the_same_merge(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    coarse = model_study(
        pico_models, pico_items, name="coarse", space={"granularity": "task"}, strategy="cma_es"
    )
    first = run_study(spec_of(coarse, tmp_path), tmp_path / "coarse")
    best = next(r for r in reversed(first.log.records) if r.kind == "search")
    fine = model_study(
        pico_models,
        pico_items,
        name="fine",
        strategy="cma_es",
        budget={"trials": 12},
        start={"run": str(tmp_path / "coarse"), "trial": best.number},
    )
    second = run_study(spec_of(fine, tmp_path), tmp_path / "fine")
    begun = next(r for r in second.log.records if r.name == f"trial {best.number} of coarse")
    assert begun.recipe.digest == best.recipe.digest
    assert dict(begun.values) == dict(best.values)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"run": "nowhere"}, "start.run: .*expected the folder of a run"),
        ({"run": "coarse", "trial": 99}, "start.run: .*expected a trial from 0 to"),
        ({"run": "other"}, "start.run: .*other: refine: a box of 5 space cannot hold"),
    ],
)
def test_what_cannot_be_begun_at_is_refused(tmp_path: Path, start: dict, message: str) -> None:
    run_in(analytic("coarse", trials=20, strategy="sobol"), tmp_path / "coarse")
    run_in(analytic("other", trials=20, dim=3, strategy="sobol"), tmp_path / "other")
    data = analytic(
        "fine", trials=20, strategy="cma_es", start={**start, "run": str(tmp_path / start["run"])}
    )
    with pytest.raises(InputError, match=message):
        run_study(spec_of(data, tmp_path), tmp_path / "fine")


def test_other_experts_are_refused(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    coarse = model_study(
        pico_models, pico_items, name="coarse", strategy="sobol", budget={"trials": 12}
    )
    run_study(spec_of(coarse, tmp_path), tmp_path / "coarse")
    swapped = {"right": str(pico_models / "right"), "left": str(pico_models / "left")}
    data = coarse | {"name": "fine", "experts": swapped, "start": {"run": str(tmp_path / "coarse")}}
    with pytest.raises(
        InputError, match=r"expected a run on the experts \['right', 'left'\], in this order"
    ):
        run_study(spec_of(data, tmp_path), tmp_path / "fine")
