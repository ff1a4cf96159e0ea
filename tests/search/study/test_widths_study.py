"""A study of widths: trials have layers of their own, and the export is what was scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exporting import export_trial
from mergesearch.search.runs.opened import open_run
from tests.merging.alignment.models import saved
from tests.merging.operators.calibrated import images
from tests.search.studies import fingerprint, spec_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    home = tmp_path_factory.mktemp("widths")
    for seed, name in enumerate("ab"):
        saved("resnet", home / name, seed)
    splits = {
        split: datasets.Dataset.from_dict(
            {
                "id": [f"{split}{n}" for n in range(12)],
                "pixels": images(12, seed)["pixels"],
                "label": [0, 1] * 6,
            }
        )
        for seed, split in enumerate(("search", "validation", "test"))
    }
    datasets.DatasetDict(splits).save_to_disk(str(home / "items"))
    return home


def study(home: Path, **more: Any) -> dict[str, Any]:
    align = {"method": "pleas", "fraction": 0.25, "sweeps": 1}
    return {
        "name": "widths",
        "seed": 2,
        "base": str(home / "a"),
        "experts": {"b": {"path": str(home / "b"), "align": align}},
        "operator": "task_arithmetic",
        "special": {"batch_norm": "merge"},
        "space": {"granularity": "block", "widths": {"choices": [0.0, 0.25, 0.5], "mean": 0.4}},
        "strategy": "sobol",
        "evaluators": [
            {
                "kind": "classification",
                "data": str(home / "items"),
                "id": "id",
                "input": "pixels",
                "label": "label",
            }
        ],
        "budget": {"trials": 8},
        "selection": {"leaders": 2},
        **more,
    }


@pytest.mark.slow  # prepares each choice of widths once
def test_trials_have_their_own_widths_and_are_exported_as_they_were_scored(
    home: Path, tmp_path: Path
) -> None:
    run = run_study(spec_of(study(home), tmp_path), tmp_path / "run")
    searched = [record for record in run.log.records if record.kind == "search"]
    assert all(record.state == "complete" for record in run.log.records)
    assert len({record.recipe.layout for record in searched}) > 1
    wide = next(r for r in searched if r.recipe.layout != run.plan.template.layout)
    exported = export_trial(run, wide, tmp_path / "out", overwrite=False, rescored=True)
    assert exported.result["identical"], exported.lines
    config = open_checkpoint(str(tmp_path / "out")).config
    shares = run.plan.space.summary(wide.point)  # type: ignore[arg-type]
    assert config["hidden_sizes"] == [
        round(size * (1 + shares[f"width/hidden_sizes.{place}"]))
        for place, size in enumerate((8, 12))
    ]
    # A run that is opened again finds the same merges.
    lines = (tmp_path / "run" / "journal.log").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", cut)
    (cut / "journal.log").write_bytes(b"".join(lines[: len(lines) // 2]))
    whole = fingerprint(run)
    assert fingerprint(run_study(spec_of(study(home), tmp_path), cut)) == whole
    assert fingerprint(open_run(tmp_path / "run")) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"b": "b"}}, "experts under align: pleas"),
        ({"space": {"granularity": "chunk", "widths": {}}}, "another granularity than chunk"),
        ({"strategy": "m2n2", "space": {"widths": {}}}, "any box with space.widths"),
    ],
)
def test_what_cannot_be_is_refused(
    home: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = study(home, **change)
    if given["experts"] == {"b": "b"}:
        given["experts"] = {"b": str(home / "b")}
    with pytest.raises(InputError, match=message):
        plan_study(spec_of(given, tmp_path))
