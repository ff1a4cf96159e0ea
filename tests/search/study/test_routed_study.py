"""Studies of input-dependent merges, from the study file to a bundle that scores as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.routing.bundle import load
from mergesearch.search.cli.check import describe_plan, plan_dict
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.headline import sentences
from mergesearch.search.runs.exported import export_bundle, rescore
from mergesearch.search.runs.opened import Run, open_run
from tests.search.conftest import SIDE, model_study
from tests.search.studies import fingerprint, run_in, spec_of

#: The study of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("routed")


def routed_study(models: Path, items: Path, kind: str, **options: Any) -> dict[str, Any]:
    study = model_study(models, items, budget={"trials": 16}, strategy={"name": "cma_es"}, seed=3)
    del study["space"]
    if kind == "t3":
        study["experts"] = {"left": study["experts"]["left"]}
    else:
        options = {
            "experts": {"odd": "left", "even": "right"},
            "router_steps": 15,
            "router_width": 8,
        } | options
    study["evaluators"][0] |= {"kind": kind, **options}
    return study


@pytest.fixture(
    scope="module",
    params=[
        "t3",
        pytest.param("t3 batch", marks=pytest.mark.slow),
        pytest.param("twin_merging", marks=pytest.mark.slow),
        "twin_merging batch",
    ],
)
def run(
    request: pytest.FixtureRequest, pico_models: Path, pico_items: Path, tmp_path_factory: Any
) -> Run:
    kind, *batch = request.param.split()
    study = routed_study(pico_models, pico_items, kind, per="batch" if batch else "item")
    return run_in(study, tmp_path_factory.mktemp("study") / "run")


def searched(run: Run) -> list[Any]:
    return [record for record in run.log.records if record.recipe.routing]


def test_parameters_are_searched_beside_checkpoints(run: Run) -> None:
    assert all(record.state == "complete" for record in run.log.records)
    points = [record for record in run.log.records if record.kind == "search"]
    assert len({tuple(record.recipe.routing) for record in points}) == len(points)
    static = [record for record in run.log.records if not record.recipe.routing]
    assert {"base", "expert left"} <= {record.name for record in static}
    assert any(r.values != static[0].values for r in searched(run))


def test_the_log_holds_every_recipe(run: Run) -> None:
    assert fingerprint(open_run(run.folder.path)) == fingerprint(run)


def test_a_bundle_scores_as_recorded(run: Run, tmp_path: Path) -> None:
    for record in (searched(run)[0], searched(run)[-1]):
        out = tmp_path / str(record.number)
        export_bundle(run, record, out, facts={"trial": "x"}, overwrite=False, threads=1)
        again = rescore(run, record, out)
        assert again.agreement.identical, (dict(again.measurement.values), record.values)
        assert "not a single checkpoint" in (out / "README.md").read_text()
        assert json.loads((out / "routing.json").read_text())["routing"] == dict(
            record.recipe.routing
        )
        answer = load(out)(pixel_values=torch.zeros(2, 1, SIDE, SIDE))
        assert answer.logits.shape == (2, 4)
        assert torch.isfinite(answer.logits).all()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_reports_say_what_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run.report_data()
    leading = searched(run)[-1]
    monkeypatch.setattr(type(data), "leading", leading)
    assert "It is not a single checkpoint" in sentences(data)[0]
    assert f"{run.plan.space.names[0]} " in sentences(data)[0]


def test_check_says_what_it_is(run: Run) -> None:
    text = "\n".join(describe_plan(run.plan))
    assert "not a single checkpoint, merged for each" in text
    assert all(name in text for name in run.plan.space.names)
    assert plan_dict(run.plan)["routing"]["method"] in ("t3", "twin_merging")


@pytest.mark.parametrize("kind", ["t3", pytest.param("twin_merging", marks=pytest.mark.slow)])
def test_a_resumed_study_goes_on_as_if_nothing_had_happened(
    kind: str, pico_models: Path, pico_items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergesearch.search.record.trial_log import TrialLog

    study = routed_study(pico_models, pico_items, kind)
    whole = run_in(study, tmp_path / "whole")
    tell = TrialLog.tell
    count = 0

    def until_ten(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return tell(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrialLog, "tell", until_ten)
        with pytest.raises(KeyboardInterrupt):
            run_in(study, tmp_path / "stopped")
    assert fingerprint(run_in(study, tmp_path / "stopped")) == fingerprint(whole)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t3", {"space": {"granularity": "block"}}, r"space.granularity: expected no space for t3"),
        (
            "t3",
            {"operator": {"name": "ties"}},
            r"operator.name: expected one of average, task_arithmetic for t3",
        ),
        ("t3", {"special": {"tied": "untie"}}, r"special.tied: expected no policy but batch_norm"),
        (
            "t3",
            {"strategy": {"name": "m2n2"}},
            r"strategy.name: expected one that searches any box",
        ),
        (
            "twin_merging",
            {"strategy": {"name": "m2n2"}},
            r"strategy.name: expected one that searches any box",
        ),
    ],
)
def test_sections_that_do_not_apply_are_refused(
    kind: str,
    change: dict[str, Any],
    message: str,
    pico_models: Path,
    pico_items: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        plan_study(spec_of(routed_study(pico_models, pico_items, kind) | change, tmp_path))


def test_t3_needs_one_expert(pico_models: Path, pico_items: Path, tmp_path: Path) -> None:
    study = routed_study(pico_models, pico_items, "t3")
    study["experts"] = model_study(pico_models, pico_items)["experts"]
    with pytest.raises(InputError, match="expected exactly one for t3"):
        plan_study(spec_of(study, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": None}, "expected one of the experts .* for domain 'even'"),
        ({"experts": {"odd": "left", "even": "left"}}, "received none for 'right'"),
    ],
)
def test_twin_merging_needs_a_domain_for_every_expert(
    options: dict[str, Any], message: str, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        plan_study(
            spec_of(routed_study(pico_models, pico_items, "twin_merging", **options), tmp_path)
        )


def test_twin_merging_needs_domains(pico_models: Path, pico_items: Path, tmp_path: Path) -> None:
    study = routed_study(
        pico_models, pico_items, "twin_merging", domain=None, objectives=[{"metric": "accuracy"}]
    )
    with pytest.raises(InputError, match="domain: required key is missing: the router"):
        plan_study(spec_of(study, tmp_path))


def test_no_evaluator_scores_a_checkpoint_beside_it(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    study = routed_study(pico_models, pico_items, "t3")
    study["evaluators"].append({"kind": "synthetic", "problem": "sphere"})
    with pytest.raises(InputError, match="expected an evaluator that merges for each input alone"):
        plan_study(spec_of(study, tmp_path))
