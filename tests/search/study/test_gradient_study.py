"""Studies that follow gradients through real models, real files, and real Ray workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging import InputError
from mergesearch.merging.in_memory import merge
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.workers.gradient_steps import (
    GradientResult,
    GradientSteps,
    OptimizerConfig,
    init_state,
)
from mergesearch.search.workers.messages import Task, WorkerSpec
from mergesearch.search.workers.worker import Worker
from tests.search.conftest import model_study
from tests.search.studies import fingerprint, spec_of


def entropy(items: Path, **options: object) -> dict:
    return {"kind": "entropy", "data": str(items), "domain": "domain", "id": "id"} | options


def labelled(items: Path, *names: str) -> dict:
    objectives = [{"name": name, "metric": name} for name in names]
    return {
        "kind": "classification",
        "data": str(items),
        "domain": "domain",
        "id": "id",
        "objectives": objectives,
    }


def study(models: Path, items: Path, **sections: object) -> dict:
    data = {
        "name": "gradients",
        "space": {},
        "strategy": {"name": "adamerging", "learning_rate": 0.02, "steps": 5},
        "evaluators": [entropy(items)],
        "budget": {"trials": 16},
    }
    return model_study(models, items, **(data | sections))


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory, pico_models: Path) -> Path:
    """The pico models in fp64."""
    from mergesearch.merging.models.loading import load_model

    folder = tmp_path_factory.mktemp("wide")
    for name in ("base", "left", "right"):
        load_model(
            str(pico_models / name), "AutoModelForImageClassification"
        ).double().save_pretrained(folder / name)
    return folder


def searched(run: Run) -> list:
    return [record for record in run.log.records if record.kind == "search"]


def test_adamerging_begins_as_task_arithmetic_to_the_bit_and_becomes_surer(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    run = run_study(spec_of(study(pico_models, pico_items), tmp_path), tmp_path / "run")
    first = searched(run)[0]
    last = searched(run)[-1]
    base, *experts = (
        load_file(pico_models / name / "model.safetensors") for name in ("base", "left", "right")
    )
    expected = merge(base, experts, operator="task_arithmetic", coefficients=0.3)
    from mergesearch.merging.export.folder import export_model

    export_model(first.recipe, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert last.values["entropy"] < 0.9 * first.values["entropy"]
    recommended = next(record for record in run.log.records if record.kind == "recommended")
    assert recommended.values["entropy"] < first.values["entropy"]
    assert all(len(record.gradient_result.losses) == 5 for record in searched(run))


@pytest.mark.parametrize("share", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("strategy", "space", "operator"),
    [
        pytest.param(
            {"name": "adamerging", "shares": 2, "steps": 2},
            {"granularity": "task"},
            "task_arithmetic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"name": "adamerging"},
            {"granularity": "block"},
            {"name": "ties", "merge": "sum"},
            marks=pytest.mark.slow,
        ),
        ({"name": "expert_merging_pp", "steps": 3}, {"chunks": {"total": 2.0}}, "task_arithmetic"),
        pytest.param({"name": "frank_wolfe"}, {}, "average", marks=pytest.mark.slow),
        ({"name": "frank_wolfe", "oracle": "cosine"}, {"granularity": "block"}, "task_arithmetic"),
        pytest.param(
            {"name": "frank_wolfe", "variant": "soft", "steps": 3},
            {},
            "task_arithmetic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"name": "hybrid", "batch_size": 2},
            {"granularity": "block"},
            "task_arithmetic",
            marks=pytest.mark.slow,
        ),
        (
            {"name": "gradient_warm_cma", "warm": 3},
            {"depth": {"basis": "dct", "size": 2}},
            "task_arithmetic",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_a_study_resumes_to_the_same_trials_from_anywhere(
    tmp_path: Path,
    pico_models: Path,
    pico_items: Path,
    strategy: dict,
    space: dict,
    operator: object,
    share: float,
) -> None:
    evaluators = [entropy(pico_items), labelled(pico_items, "accuracy")]
    data = study(
        pico_models,
        pico_items,
        strategy=strategy,
        space=space,
        operator=operator,
        evaluators=evaluators,
    )
    spec = spec_of(data, tmp_path)
    whole = run_study(spec, tmp_path / "whole")
    assert whole.verdict is not None
    assert not [record.failure for record in whole.log.records if record.failure]
    lines = (tmp_path / "whole" / "journal.log").read_bytes().splitlines(keepends=True)
    folder = tmp_path / f"cut {share}"
    shutil.copytree(tmp_path / "whole", folder)
    cut = int(share * len(lines))
    (folder / "journal.log").write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
    resumed = run_study(spec, folder)
    assert fingerprint(resumed) == fingerprint(whole), f"cut after line {cut}"
    assert resumed.verdict == whole.verdict


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_workers_share_a_step_and_arrive_where_one_worker_does(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    def points(name: str, **sections: object) -> np.ndarray:
        options = {
            "name": "adamerging",
            "learning_rate": 0.02,
            "steps": 3,
            "restarts_in_parallel": 1,
            "batch_size": 6,
        }
        strategy = options | {"shares": 2}
        space = {"granularity": "block"}
        data = study(pico_models, pico_items, strategy=strategy, space=space, **sections)
        if name == "alone":
            data["strategy"] = options
            data["budget"] = {"trials": 7 + 1 + 3}
        run = run_study(spec_of(data, tmp_path), tmp_path / name)
        return np.array([record.point for record in searched(run) if record.state == "complete"])

    budget = {"trials": 7 + 1 + 2 * 3 * 2 + 1}
    inline = points("inline", budget=budget)
    parallel = points("ray", budget=budget, workers={"count": 2})
    alone = points("alone")
    assert len(inline) == 3
    np.testing.assert_allclose(parallel, inline, rtol=0, atol=1e-9)
    # fp32 backward passes over parts of a batch add up in another order.
    np.testing.assert_allclose(alone[:3], inline, rtol=0, atol=1e-4)


def test_gradients_count_as_evaluations(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    spec = spec_of(study(pico_models, pico_items, budget={"evaluations": 24 * 12}), tmp_path)
    run = run_study(spec, tmp_path / "run")
    # A batch has 16 items of each domain at most, and a domain has 12.
    assert all(record.gradient_items == 5 * 24 for record in searched(run))
    assert sum(24 + record.gradient_items for record in run.log.records) <= 24 * 12


def test_what_cannot_be_followed_is_refused_before_weights_are_read(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    def refused(match: str, **sections: object) -> None:
        with pytest.raises(InputError, match=match):
            plan_study(spec_of(study(pico_models, pico_items, **sections), tmp_path))

    refused("needs .'gradient'.", evaluators=[labelled(pico_items, "accuracy")])
    refused(r"operator\.mode", operator={"name": "ties", "mode": "live"})
    refused(r"strategy\.objectives", strategy={"name": "adamerging", "objectives": ["accuracy"]})
    cosine = {"name": "frank_wolfe", "oracle": "cosine"}
    refused(r"strategy\.oracle", strategy=cosine, special={"scalars": "log"})
    refused(r"special\.batch_norm", special={"batch_norm": "merge"})


def test_transductive_use_is_asked_for_and_named(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    plain, asked = (
        study(pico_models, pico_items, evaluators=[entropy(pico_items, transductive=value)])
        for value in (False, True)
    )
    assert "transductive" not in "\n".join(describe_plan(plan_study(spec_of(plain, tmp_path))))
    assert "transductive" in "\n".join(describe_plan(plan_study(spec_of(asked, tmp_path))))
    run_study(spec_of(asked, tmp_path), tmp_path / "run")
    assert "Transductive" in (tmp_path / "run" / "report.html").read_text()


SPACES = [
    *(
        {"granularity": name}
        for name in ("global", "task", "module", "block", "block_module", "tensor")
    ),
    {"granularity": "chunk", "chunks": {"total": 1.5}},
    *({"depth": {"basis": basis, "modules": True}} for basis in ("linear", "dct", "bspline")),
    {"granularity": "global", "depth": {"basis": "dct", "size": 2, "clip": True}},
]


@pytest.mark.parametrize("space", SPACES, ids=lambda value: "-".join(map(str, value.values())))
@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "tsv"])
def test_the_gradient_of_a_point_is_that_of_differences(
    tmp_path: Path, wide_models: Path, pico_items: Path, space: dict, operator: str
) -> None:
    data = study(
        wide_models,
        pico_items,
        space=space | {"bounds": [0.0, 1.0], "start": 0.4},
        operator=operator,
    )
    plan = plan_study(spec_of(data, tmp_path))
    assert plan.differentiable_space is not None
    evaluator = {"kind": "entropy", "data": str(pico_items), "domain": "domain", "id": "id"}
    worker = Worker(
        WorkerSpec(plan.template, (evaluator,), str(tmp_path), space=plan.differentiable_space)
    )
    rng = np.random.default_rng(0)
    point = plan.space.start + rng.uniform(-0.1, 0.1, plan.space.start.size)
    rule = OptimizerConfig(plan.space.lower, plan.space.upper, point, {"entropy": 1.0})

    def gradient_result(at: np.ndarray) -> GradientResult:
        task = Task(
            "", plan.space.decode(at), "search", 0, at, GradientSteps(rule, init_state(rule, at), 0)
        )
        outcome = worker.run(task)
        assert outcome.gradient_result is not None, outcome.failure
        return outcome.gradient_result

    gradient = gradient_result(point).gradient
    assert gradient is not None
    for _ in range(2):
        along = rng.standard_normal(point.size)
        step = 1e-5
        up, down = (gradient_result(point + sign * step * along).losses[0] for sign in (1, -1))
        assert gradient @ along == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)
