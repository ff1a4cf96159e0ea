"""Every strategy in a real study: the budget is spent, and every cut of the log resumes exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mergesearch.search.runs.driver import run_study
from tests.contracts.problems import CASES
from tests.search.strategies.every_strategy import label, study_of
from tests.search.studies import fingerprint, spec_of

#: Where the journal is cut; the second place is for the long suite.
CUTS = (0.4, pytest.param(0.8, marks=pytest.mark.slow))
#: For the long suite: a strategy of the same family stays, and the contract replays each of them.
LONG = {
    *("nested_map", "nsga3", "sms_emoa", "cma_parego", "model_swarms", "pcb_es"),
    *(
        "evo_merging",
        "medsamix",
        "gradient_warm_cma",
        "frank_wolfe",
        "expert_merging",
        "expert_merging_pp",
    ),
}
RESUMED = [
    pytest.param(*case, marks=pytest.mark.slow) if case[1] or case[0] in LONG else case
    for case in CASES
]


@pytest.mark.parametrize("share", CUTS)
@pytest.mark.parametrize(("name", "options"), RESUMED, ids=label)
def test_a_study_resumes_to_the_same_trials_from_anywhere(
    tmp_path: Path, pico_models: Path, pico_items: Path, name: str, options: dict, share: float
) -> None:
    spec = spec_of(study_of(name, options, pico_models, pico_items), tmp_path)
    whole = run_study(spec, tmp_path / "whole")
    assert len(whole.log.records) == spec.budget.trials
    assert whole.verdict is not None
    assert all(record.state in ("complete", "partial", "failed") for record in whole.log.records)
    lines = (tmp_path / "whole" / "journal.log").read_bytes().splitlines(keepends=True)
    rng = np.random.default_rng(1)
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    cut = int(share * len(lines))
    torn = lines[cut][: int(rng.integers(0, len(lines[cut])))]
    (folder / "journal.log").write_bytes(b"".join(lines[:cut]) + torn)
    resumed = run_study(spec, folder)
    assert fingerprint(resumed) == fingerprint(whole), f"cut after line {cut}"
    assert resumed.verdict == whole.verdict
