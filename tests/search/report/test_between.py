"""What is expected between measured trials: near the truth, with honest errors, or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from typer.testing import CliRunner

from mergesearch.merging import InputError, RunFolderError
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.search.cli.main import app
from mergesearch.search.report.between.expected import combinations, compromises, expected_at
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.page.panel import panel_data
from tests.search.conftest import model_study
from tests.search.report.test_report import OBJECTIVES, make_study
from tests.search.studies import analytic, run_in

pytestmark = pytest.mark.xdist_group("report")

Array = npt.NDArray[np.float64]


def study(objectives: int, trials: int = 120, noise: float = 0.0, seed: int = 0) -> ReportData:
    """A study whose objectives are those of :func:`truth`, with noise of a known size."""
    data = make_study(objectives, trials, seed=seed, finished=False)
    rng = np.random.default_rng(seed)
    names = [objective.name for objective in data.objectives]
    records = []
    for record in data.records:
        if record.state == "complete":
            exact = truth(record.point, objectives)
            values = exact + noise * rng.standard_normal(objectives)
            record = dataclasses.replace(
                record,
                values=dict(zip(names, values.tolist(), strict=True)),
                errors=dict.fromkeys(names, noise),
            )
        records.append(record)
    return dataclasses.replace(data, records=records, means_at=lambda point: point.tolist())


def truth(point: Array, objectives: int) -> Array:
    """Each objective is best at a corner of its own, and not quite quadratic around it."""
    corners = 0.3 + 0.3 * np.eye(4)[:objectives]
    distances = np.linalg.norm(corners - point, axis=1)
    shares = 1.0 / np.cosh(1.5 * distances)
    directions = [objective.direction for objective in OBJECTIVES[:objectives]]
    return np.where([d == "maximize" for d in directions], shares, 2 * (1 - shares))


@pytest.mark.parametrize("objectives", [2, 3])
def test_expectations_are_as_near_to_the_truth_as_they_say(objectives: int) -> None:
    found = compromises(study(objectives, noise=0.01))
    assert not isinstance(found, str)
    misses = []
    for weights in combinations(objectives):
        told = found.expected(weights, found.best(weights), ())
        exact = truth(found.best(weights), objectives)
        misses.append((np.array(told.values) - exact) / np.array(told.errors))
    assert np.abs(misses).max() < 3
    assert np.sqrt(np.mean(np.square(misses))) < 1
    # Errors hold for measurements, which have noise of their own, and are of its size.
    assert min(told.errors) > 0.005
    assert max(told.errors) < 0.03


def test_the_expected_compromise_is_better_than_the_measured_one() -> None:
    data = study(3, trials=80)
    found = compromises(data)
    assert not isinstance(found, str)
    gains = []
    for weights in combinations(3):
        measured = found.points[int(np.argmin(found.losses @ weights))]
        losses = [found.signs * truth(point, 3) for point in (measured, found.best(weights))]
        before, after = (found.normaliser.scalarise(each, weights) for each in losses)
        gains.append(before - after)
    assert np.mean(np.array(gains) > 0) > 0.9
    low, high = found.points.min(axis=0), found.points.max(axis=0)
    for weights in combinations(3):
        assert np.all(found.best(weights) >= low - 1e-9)
        assert np.all(found.best(weights) <= high + 1e-9)


def test_a_surrogate_that_predicts_nothing_says_so() -> None:
    data = study(2)
    rng = np.random.default_rng(1)
    records = [
        dataclasses.replace(record, values=record.values | {"accuracy": rng.uniform()})
        if record.state == "complete"
        else record
        for record in data.records
    ]
    random = dataclasses.replace(data, records=records)
    found = compromises(random)
    assert isinstance(found, str)
    assert found.startswith(
        "trials that were left out are predicted hardly better than by a mean: "
    )
    assert "accuracy (error " in found
    assert "cross_entropy" not in found
    kept = with_kept(random).kept
    assert kept is not None
    assert kept.between is not None
    assert (kept.between.expected, kept.between.why) == ((), found)
    with pytest.raises(RunFolderError, match="nothing is expected between trials: trials that"):
        expected_at(random, np.array([1.0, 1.0]))


@pytest.mark.parametrize(
    ("objectives", "trials", "why"),
    [(2, 20, "fewer than 20 trials"), (1, 60, "no objectives to weigh")],
)
def test_what_is_not_enough_is_named(objectives: int, trials: int, why: str) -> None:
    found = compromises(study(objectives, trials))
    assert isinstance(found, str)
    assert why in found


@pytest.mark.parametrize("objectives", range(2, 9))
def test_weights_are_evenly_spaced(objectives: int) -> None:
    all_weights = combinations(objectives)
    assert objectives < len(all_weights) <= 100
    assert np.allclose([weights.sum() for weights in all_weights], 1)
    assert len({tuple(weights) for weights in all_weights}) == len(all_weights)
    for m in range(objectives):
        assert any(weights[m] == 1 for weights in all_weights)


def expect(run: Path, *weights: str) -> str:
    """What the command line prints for weights."""
    options = [part for weight in weights for part in ("--expected", weight)]
    told = CliRunner().invoke(app, ["recipe", str(run), *options])
    if told.exception is not None:
        raise told.exception
    return told.output


def test_the_page_and_the_command_line_expect_the_same(tmp_path: Path) -> None:
    two = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2}
    run = run_in(analytic(trials=40, evaluators=[two], strategy="nsga2"), tmp_path / "run")
    shown = panel_data(run.report_data())["between"]
    assert shown["why"] == ""
    row = next(each for each in shown["expected"] if each["w"] == (0.25, 0.75))
    folder = run.folder.path
    weights = "--expected 'task 1=0.25' --expected 'task 2=0.75'"
    assert row["x"].splitlines() == [
        f"mergesearch recipe {folder} {weights} > compromise.yaml",
        f"mergesearch replay compromise.yaml --study {folder}/study.yaml",
    ]
    text = expect(folder, "task 1=1", "task 2=3")
    lines = text.splitlines()
    assert lines[0].startswith("# Expected on search items, not measured")
    assert lines[1:3] == [f"# task 1: {row['v'][0]}", f"# task 2: {row['v'][1]}"]
    (tmp_path / "compromise.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "compromise.yaml")
    assert [f"{mean:.3g}" for mean in recipe.field.values.mean(axis=1)] == row["c"]
    with pytest.raises(InputError, match="--expected speed=1: expected NAME=WEIGHT"):
        expect(folder, "speed=1")


@pytest.mark.slow
def test_what_is_expected_is_measured_by_the_commands_of_the_page(
    pico_models: Path, pico_items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = model_study(
        pico_models,
        pico_items,
        budget={"trials": 60},
        space={"granularity": "task"},
        strategy={"name": "nsga2"},
    )
    for objective in study["evaluators"][0]["objectives"]:
        objective["metric"] = "cross_entropy"
    run = run_in(study, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    text = expect(run.folder.path, "odd=1", "even=1")
    written: dict[str, Any] = yaml.safe_load(text)
    assert "coefficients" in written  # as one would write it
    (tmp_path / "compromise.yaml").write_text(text)
    file = str(run.folder.study_file)
    told = CliRunner().invoke(app, ["replay", "compromise.yaml", "--study", file, "--json"])
    assert told.exception is None, told.output
    assert json.loads(told.output)["scores"]["values"].keys() == {"odd", "even"}
