"""Studies whose search uses a share of the validation items (``selection.lend``)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import Batch
from mergesearch.evaluators.data.lending import joined, lent_items, rows_of
from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.caveats import caveats
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.publishing import report_data
from tests.search.conftest import model_study
from tests.search.studies import analytic, fingerprint, spec_of

#: Of the 24 validation items, half are lent to the 24 search items.
LENT = 12


def study(models: Path, items: Path, lend: float | None = 0.5, **sections: Any) -> dict[str, Any]:
    sections = {"selection": {"leaders": 2, "lend": lend}, "budget": {"trials": 16}} | sections
    data = model_study(models, items, **sections)
    data["evaluators"][0]["objectives"] = [{"name": "accuracy"}]
    return data | {"strategy": "sobol"}


@pytest.fixture(scope="module")
def run(pico_models: Path, pico_items: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lending")
    return run_study(spec_of(study(pico_models, pico_items), folder), folder / "run")


def _caveats(run: Run) -> list[str]:
    return caveats(report_data(run.folder, run.plan, run.log))


def test_every_domain_lends_in_proportion_and_keeps_an_item() -> None:
    domains = np.array(["a"] * 60 + ["b"] * 20 + ["c"] * 4)
    lent = lent_items(domains, 0.75)
    assert [int(lent[domains == name].sum()) for name in "abc"] == [45, 15, 3]
    assert np.array_equal(lent, lent_items(domains, 0.75))
    assert not lent_items(domains, 0.0).any()
    assert (~lent_items(domains, 0.999)).sum() == 3


def test_columns_of_any_kind_are_joined() -> None:
    lent = np.array([True, False, True])
    assert joined(["x"], rows_of(["p", "q", "r"], lent)) == ["x", "p", "r"]
    pixels = np.arange(6.0).reshape(3, 2)
    assert joined(pixels, rows_of(pixels, lent)).tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
        [0, 1],
        [4, 5],
    ]
    ragged = joined(np.zeros((1, 2)), np.zeros((1, 3)))
    assert [row.shape for row in ragged] == [(2,), (3,)]


def test_an_item_is_scored_in_the_search_or_in_the_choice(
    run: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    """The items of both splits together are those of a study that lends nothing."""
    assert run.verdict is not None
    plain = run_study(spec_of(study(pico_models, pico_items, None), tmp_path), tmp_path / "run")
    assert plain.verdict is not None
    domains = np.array(["odd", "even"] * 12)
    lent = lent_items(domains, 0.5)
    for record, other in zip(run.log.records[:6], plain.log.records[:6], strict=True):
        assert record.kind == "anchor"
        assert record.recipe == other.recipe
        whole = plain.verdict.scores["validation"][record.number].items["accuracy"]
        kept = run.verdict.scores["validation"][record.number].items["accuracy"]
        searched = record.items["accuracy"]
        assert np.array_equal(searched, np.append(other.items["accuracy"], whole[lent]))
        assert np.array_equal(kept, whole[~lent])
        assert record.values["accuracy"] == pytest.approx(searched.mean())
    assert {*run.verdict.scores["test"]} <= {*run.verdict.scores["validation"]}
    assert any("used 50% of the files' validation items" in line for line in _caveats(run))
    assert not any("of the files' validation items" in line for line in _caveats(plain))


def test_a_killed_study_goes_on_with_the_same_items(
    run: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder.path, folder)
    lines = (folder / "journal.log").read_bytes().splitlines(keepends=True)
    (folder / "journal.log").write_bytes(b"".join(lines[: len(lines) // 2]))
    resumed = run_study(spec_of(study(pico_models, pico_items), tmp_path), folder)
    assert fingerprint(resumed) == fingerprint(run)
    assert resumed.verdict == run.verdict


def test_another_share_is_another_study(run: Run, pico_models: Path, pico_items: Path) -> None:
    other = spec_of(study(pico_models, pico_items, 0.25), run.folder.path.parent)
    with pytest.raises(InputError, match="lend"):
        run_study(other, run.folder.path)


def test_an_exported_winner_is_scored_on_the_same_search_items(run: Run, tmp_path: Path) -> None:
    record = next(record for record in run.log.records if record.kind == "search")
    export_model(record.recipe, tmp_path / "out")
    rescored = rescore(run, record, tmp_path / "out")
    assert rescored.split == "search"
    assert rescored.agreement.identical


def test_budget_gradients_and_check_count_the_lent_items(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    plan = plan_study(spec_of(study(pico_models, pico_items), tmp_path))
    evaluator = plan.evaluator
    assert evaluator.cost("search") == 24 + LENT
    assert evaluator.size("validation") == 24 - LENT
    assert evaluator.size("test") == 24
    assert evaluator.batch_cost(Batch()) == 24 + LENT
    line = "items       36 search, 12 validation, 24 test (the search has 50% of the files' "
    assert f"{line}validation items)" in describe_plan(plan)


def test_items_that_no_file_has_are_not_lent(tmp_path: Path) -> None:
    data = analytic(selection={"lend": 0.5})
    with pytest.raises(InputError, match=r"selection\.lend: expected evaluators whose items come"):
        plan_study(spec_of(data, tmp_path))
