"""Names of version 0.1: one clear line in a study file, read in the folder of an old run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mergesearch.merging import InputError
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.renamed import with_new_names
from tests.search.studies import analytic, fingerprint, spec_of

#: A race of a portfolio of `random` and `cma_es`, 14 trials, run to its end by version 0.1.
OLD_RUN = Path(__file__).parents[2] / "golden" / "run_0_1"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"strategy": "random"}, "strategy: 'random' is called 'sobol' since 0.2"),
        ({"strategy": {"name": "random"}}, "strategy.name: 'random' is called 'sobol' since 0.2"),
        (
            {"strategy": {"name": "portfolio", "members": ["cma_es", {"name": "random"}]}},
            "strategy.members.1.name: 'random' is called 'sobol' since 0.2",
        ),
        (
            {"strategy": {"name": "adamerging", "chains": 1}},
            "strategy.chains: 'chains' is called 'restarts_in_parallel' since 0.2",
        ),
        (
            {"fidelity": {"rule": "subset", "order": "anchors"}},
            "fidelity.order: 'anchors' is called 'representative' since 0.2",
        ),
        (
            {"fidelity": {"rule": "subset", "estimate": "anchors"}},
            "fidelity.estimate: 'anchors' is called 'representative' since 0.2",
        ),
    ],
)
def test_a_study_file_with_an_old_name_is_told_the_new_one(
    sections: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        spec_of(analytic(**sections), tmp_path)
    assert str(error.value) == f"study.yaml: {message}; rename it"
    spec_of(with_new_names(analytic(**sections)), tmp_path)


def test_names_of_today_are_left_alone() -> None:
    sections = {"strategy": {"name": "optuna", "sampler": "random"}, "fidelity": "race"}
    assert with_new_names(analytic(**sections)) == analytic(**sections)


def test_a_finished_run_of_the_old_version_is_read(tmp_path: Path) -> None:
    run = open_run(shutil.copytree(OLD_RUN, tmp_path / "run"))
    assert run.plan.spec.strategy.options["members"][0] == "sobol"
    assert run.verdict is not None
    assert run.verdict.winner == 1
    assert [record.tells_at_ask for record in run.log.records if record.kind == "search"]
    assert {record.state for record in run.log.records} == {"complete", "partial"}


def test_an_unfinished_run_of_the_old_version_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    whole = open_run(shutil.copytree(OLD_RUN, tmp_path / "whole"))
    cut = shutil.copytree(OLD_RUN, tmp_path / "cut")
    lines = (cut / "journal.log").read_text().splitlines(keepends=True)
    (cut / "journal.log").write_text("".join(lines[: len(lines) // 2]))
    before = open_run(cut)
    assert 0 < len(before.log.records) < len(whole.log.records)
    resumed = run_study(before.plan.spec, cut)
    assert fingerprint(resumed) == fingerprint(whole)
    assert resumed.verdict == whole.verdict
