"""Studies of one mixture: budgets are kept, exports are what was scored, runs go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.mixture.counting import counted_statistics
from mergesearch.merging.mixture.exporting import export_mixture
from mergesearch.merging.mixture.in_recipe import mixture_of
from mergesearch.merging.mixture.planning import opened
from mergesearch.merging.mixture.recipe import load_mixture_recipe
from mergesearch.merging.mixture.writing import shrink_mixture
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.headline import headline
from mergesearch.search.report.saved import saved_data
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exporting import export_trial
from mergesearch.search.runs.opened import open_run
from mergesearch.search.runs.publishing import recipe_as_text
from mergesearch.spaces.mixture_space import MixtureSpace
from tests.merging.mixture.conftest import save_mixture
from tests.search.studies import fingerprint, spec_of

Study = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of a Mixtral of two blocks with five experts each."""
    from datasets import Dataset, DatasetDict

    home = tmp_path_factory.mktemp("mixture")
    save_mixture("mixtral", home / "base")
    rng = np.random.default_rng(3)
    splits = {
        name: Dataset.from_dict(
            {"id": [f"{name}-{n}" for n in range(8)], "ids": rng.integers(3, 30, (8, 8)).tolist()}
        )
        for name in ("train", "search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(str(home / "items"))
    calibration = {
        "data": str(home / "items"),
        "model_class": "AutoModelForCausalLM",
        "inputs": {"input_ids": "ids"},
    }

    def written(**sections: Any) -> dict[str, Any]:
        data = {
            "name": "smaller",
            "seed": 4,
            "base": str(home / "base"),
            "operator": {"name": "mc_smoe", "calibration": calibration},
            "space": {"mixture": {"mean": 2.5, "choices": [1, 2, 4]}},
            "strategy": "sobol",
            "evaluators": [
                {"kind": "language_model", "data": str(home / "items"), "id": "id", "input": "ids"}
            ],
            "budget": {"trials": 9},
            "selection": {"leaders": 2},
        }
        operator = sections.pop("options", {})
        data["operator"] |= operator  # type: ignore[operator]
        return data | sections

    return written


def test_trials_keep_the_budget_and_are_exported_as_they_were_scored(
    study: Study, tmp_path: Path
) -> None:
    mixture = {"mean": 2.5, "choices": [1, 2, 4], "weights": True}
    data = study(space={"mixture": mixture}, options={"rank": 0.5, "density": 0.1})
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    searched = [dict(r.recipe.mixture) for r in run.log.records if r.kind == "search"]
    assert searched
    assert {sum(each["experts"]) for each in searched} <= {4, 5}
    assert len({tuple(each["experts"]) for each in searched}) > 1
    assert all(np.shape(each["weights"]) == (2, 5) for each in searched)
    unequal = next(r for r in run.log.records if len({*dict(r.recipe.mixture)["experts"]}) == 2)
    out = tmp_path / "out"
    exported = export_trial(run, unequal, out, overwrite=False, rescored=True)
    assert exported.result["identical"], exported.lines
    assert any("different experts, and each stores" in line for line in exported.lines)
    config = json.loads((out / "config.json").read_text())
    assert config["num_local_experts"] == max(dict(unequal.recipe.mixture)["experts"])
    assert "different experts, and each stores" in (out / "README.md").read_text()
    told = headline(run.report_data())
    assert "Its blocks keep " in told[0]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["headline"] == told
    saved = saved_data(tmp_path / "run")
    assert saved is not None
    assert headline(saved) == told
    # The recipe, as it is printed and as the folder has it, makes it again.
    printed = tmp_path / "printed.yaml"
    printed.write_text(recipe_as_text(unequal.recipe, run.plan.layout))
    again = shrink_mixture(load_mixture_recipe(printed), tmp_path / "again")
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["hyperparameters"] == yaml.safe_load(printed.read_text())["hyperparameters"]
    assert (
        open_checkpoint(str(again.folder)).fingerprint() == open_checkpoint(str(out)).fingerprint()
    )


def test_a_run_goes_on_to_the_same_trials(study: Study, tmp_path: Path) -> None:
    spec = spec_of(study(strategy="cma_es"), tmp_path)
    whole = run_study(spec, tmp_path / "run")
    assert fingerprint(open_run(tmp_path / "run")) == fingerprint(whole)
    lines = (tmp_path / "run" / "journal.log").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", cut)
    (cut / "journal.log").write_bytes(b"".join(lines[: len(lines) // 2]))
    assert fingerprint(run_study(spec, cut)) == fingerprint(whole)


def test_anchors_are_uniform_by_usage_and_pruned(study: Study, tmp_path: Path) -> None:
    run = run_study(spec_of(study(space={"mixture": {"total": 4}}), tmp_path), tmp_path / "run")
    names = [anchor.name for anchor in run.plan.anchors]
    assert names == ["2 in each block", "2 by usage", "pruned to 2"]  # the start is uniform
    space = run.plan.space
    assert isinstance(space, MixtureSpace)
    uniform = run.plan.anchors[0].recipe
    point = run.plan.point_of(uniform)
    assert point is not None
    assert space.decode(point) == uniform == space.decode(space.start)
    assert run.plan.point_of(run.plan.anchors[2].recipe) is None
    pruned = export_trial(run, run.trial(2), tmp_path / "pruned", overwrite=False, rescored=True)
    assert pruned.result["identical"]


def test_references_keep_all_experts(study: Study, tmp_path: Path) -> None:
    data = study(budget={"trials": 8})
    data["evaluators"][0]["objectives"] = [{"name": "loss", "normalise": "base"}]
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    whole = run.plan.reference("base")
    export_mixture(whole, tmp_path / "whole")
    before = open_checkpoint(run.plan.template.base.path)
    assert open_checkpoint(str(tmp_path / "whole")).fingerprint() == before.fingerprint()
    assert run.log.results.references("search")["base"]


def test_the_start_follows_usage(study: Study, tmp_path: Path) -> None:
    base = spec_of(study(), tmp_path).base
    assert base is not None
    for total in (3, 7, 9):
        mixture = {"total": total, "prior": "usage"}
        plan = plan_study(spec_of(study(space={"mixture": mixture}), tmp_path))
        assert isinstance(plan.space, MixtureSpace)
        recipe = mixture_of(plan.template)
        usage = [own.usage for own in counted_statistics(recipe, *opened(recipe))]
        # The most used of each block stay, and then the most used of the model.
        others = sorted((-value, b) for b, row in enumerate(usage) for value in sorted(row)[:-1])
        chosen = [b for _, b in others[: total - 2]]
        assert plan.space.counts(plan.space.start).tolist() == [
            1 + chosen.count(0),
            1 + chosen.count(1),
        ]
        assert "by usage" not in " ".join(anchor.name for anchor in plan.anchors)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"experts": {"one": "."}}, "experts: expected none"),
        ({"space": {}}, "space.mixture: required key is missing"),
        ({"space": {"mixture": {"mean": 2}, "granularity": "task"}}, "space.granularity: means"),
        ({"space": {"mixture": {"mean": 6}}}, "space.mixture.mean: expected a number from 1 to 5"),
        ({"space": {"mixture": {"total": 1}}}, "space.mixture.total: expected a number from 2"),
        ({"space": {"mixture": {"mean": 2, "choices": [2, 6]}}}, "as many as a block has"),
        ({"space": {"mixture": {"mean": 2, "choices": [2]}}}, "nothing is left to search"),
        ({"space": {"mixture": {"mean": 2, "prior": [1.0]}}}, "a list of 2 numbers"),
        ({"options": {"experts": 2}}, "operator.experts: expected none in a study"),
        ({"options": {"name": "prune_experts"}}, "which drops them"),
        ({"strategy": "evolution_map"}, "strategy"),
        ({"workers": {"gpus": 2}}, "workers.gpus"),
        (
            {
                "options": {"name": "average_experts"},
                "space": {"mixture": {"mean": 2, "weights": True}},
            },
            "which weights all alike",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    sections: dict[str, Any], words: str, study: Study, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        plan_study(spec_of(study(**sections), tmp_path))
