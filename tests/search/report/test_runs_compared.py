"""`mergesearch compare`: winners of several runs on the same test items."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.cli.main import app
from mergesearch.search.record.trial_record import Score, TrialSummary, Verdict
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.runs_compared import compare_runs
from mergesearch.search.runs.reading import read_run
from tests.search.report.test_report import Links, plot_data
from tests.search.studies import analytic, run_in

ACCURACY = Objective("accuracy", "maximize")
LOSS = Objective("loss", "minimize")


def ran(
    run: str,
    right: np.ndarray,
    *,
    objectives: tuple[Objective, ...] = (ACCURACY,),
    digest: str = "same",
    **resolved: Any,
) -> ReportData:
    """A finished run of one trial, whose winner is right on some items."""
    values = {"accuracy": float(right.mean()), "loss": 1 - float(right.mean())}
    error = float(right.std(ddof=1) / len(right) ** 0.5)
    names = [objective.name for objective in objectives]
    items = {"accuracy": right.astype(float), "loss": 1 - right.astype(float)}
    score = Score(
        {name: values[name] for name in names},
        dict.fromkeys(names, error),
        {name: items[name] for name in names},
    )
    record = TrialSummary(number=0, kind="search", name="", state="complete", values=score.values)
    return ReportData(
        study=run,
        run=run,
        objectives=objectives,
        weights=[1 / len(names)] * len(names),
        records=[record],
        verdict=Verdict(0, (), (0,), {"validation": {}, "test": {0: score}}),
        fingerprint={"evaluation settings": digest},
        resolved={"name": run, "strategy": {"name": "cma_es"}} | resolved,
    )


def right(share: float, count: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def test_the_interval_of_the_same_items_is_paired_and_narrow() -> None:
    first = right(0.7)
    second = first.copy()
    second[:30] = True
    paired = compare_runs([ran("a", first), ran("b", second)]).differences
    alone = compare_runs([ran("a", first), ran("b", second, digest="other")])
    assert paired[0].improvement == pytest.approx(second.mean() - first.mean())
    assert paired[0].paired
    assert paired[0].low > 0
    assert not alone.differences[0].paired
    assert alone.differences[0].low < 0
    assert "under other settings" in alone.notes[0]


def test_better_means_less_where_less_is_better() -> None:
    runs = [ran(name, right(share), objectives=(LOSS,)) for name, share in (("a", 0.6), ("b", 0.9))]
    (difference,) = compare_runs(runs).differences
    assert difference.improvement == pytest.approx(right(0.9).mean() - right(0.6).mean())
    assert difference.low > 0


def test_more_comparisons_make_wider_intervals() -> None:
    others = [ran(f"b{seed}", right(0.7, seed=seed)) for seed in range(1, 9)]
    first = ran("a", right(0.7))
    alone = compare_runs([first, others[0]]).differences[0]
    among = compare_runs([first, *others]).differences[0]
    assert among.high - among.low > 1.2 * (alone.high - alone.low)


def test_only_shared_objectives_are_compared_and_the_others_named() -> None:
    both = ran("a", right(0.7), objectives=(ACCURACY, LOSS))
    compared = compare_runs([both, ran("b", right(0.8))])
    assert compared.objectives == (ACCURACY,)
    assert compared.notes == ("Not in all runs: loss.",)
    with pytest.raises(InputError, match=r"an objective that all runs have.*a: .*b: "):
        compare_runs([ran("a", right(0.7)), ran("b", right(0.7), objectives=(LOSS,))])


def test_a_run_without_a_winner_is_not_measured_against_one_that_has() -> None:
    first = ran("a", right(0.7))
    open_ = replace(first, run="b", verdict=None)
    compared = compare_runs([first, open_])
    assert compared.differences == ()
    assert "a on test and b on search" in compared.notes[0]
    assert "trial 0 so far" in "\n".join(compared.lines())


def test_the_keys_that_differ_are_listed() -> None:
    other = ran("b", right(0.8), strategy={"name": "map"})
    text = "\n".join(compare_runs([ran("a", right(0.7)), other]).lines())
    assert '  strategy.name: "cma_es" -> "map"' in text
    assert "b: accuracy 0.1" in text


def test_the_command_reads_runs_from_their_folders(tmp_path: Path) -> None:
    for name, strategy in (("one", "cma_es"), ("two", "sobol")):
        run_in(analytic(trials=12, strategy={"name": strategy}), tmp_path / name)
        for file in ("journal.log", "study.yaml"):
            (tmp_path / name / file).unlink()
    folders = [str(tmp_path / name) for name in ("one", "two")]
    result = CliRunner().invoke(app, ["compare", *folders, "--json"])
    assert result.exit_code == 0, result.output
    compared = json.loads(result.output)
    assert [run["run"] for run in compared["runs"]] == folders
    assert compared["differences"][0]["paired"]
    alone = CliRunner().invoke(app, ["compare", folders[0]])
    assert isinstance(alone.exception, InputError)


def test_the_report_is_written_again_from_the_folder_alone(tmp_path: Path) -> None:
    run_in(analytic(trials=12), tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    (tmp_path / "run" / "journal.log").unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert page.read_text() == before


def test_fronts_of_all_runs_are_in_one_picture(tmp_path: Path) -> None:
    two = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2, "items": 40}
    for seed, name in enumerate(("first", "<b>second")):
        run_in(analytic(trials=20, evaluators=[two], strategy="nsga2", seed=seed), tmp_path / name)
    folders = [str(tmp_path / name) for name in ("first", "<b>second")]
    page = tmp_path / "compare.html"
    result = CliRunner().invoke(app, ["compare", *folders, "--out", str(page), "--json"])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    figure = plot_data(text, "runs")
    assert [trace["name"] for trace in figure["data"]] == [escape(each) for each in folders]
    for folder, trace in zip(folders, figure["data"], strict=True):
        data = read_run(Path(folder))
        assert set(trace["x"]) == {r.values["task 1"] for r in [*data.front, data.winner]}
        assert trace["marker"]["symbol"].count("star") == 1
        assert f"trial {data.winner.number}" in trace["text"][-1]
    for run in json.loads(result.stdout)["runs"]:
        assert escape(run["name"]) in text
    assert "seed: 0 -&gt; 1" in text
    links = Links(text)
    assert links.fetched == []
    assert "b" not in links.tags
    refused = CliRunner().invoke(app, ["compare", *folders, "--out", str(page / "below a file")])
    assert isinstance(refused.exception, InputError)
    assert "expected a file that can be written" in str(refused.exception)
