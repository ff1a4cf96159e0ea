"""What is proposed for data of several forms, and how large a study becomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesearch.search.init.commented import Key, commented, plain
from mergesearch.search.init.sizing import ENOUGH, FEWEST_ITEMS, size_of
from mergesearch.search.init.tables import split_roles
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.cost.trial_cost import Cost
from tests.search.cli.test_cli import mergesearch
from tests.search.conftest import model_study
from tests.search.init.journeys import PICTURES, reviews, write_csv
from tests.search.studies import write_study


def proposed(folder: Path, *arguments: object) -> dict[str, Any]:
    """The study that ``init`` writes, which passes its check."""
    out = folder / "study.yaml"
    code, _, err = mergesearch("init", *arguments, "--no-measure", "--out", out)
    assert code == 0, err
    study = yaml.safe_load(out.read_text())
    assert isinstance(study, dict)
    return study


class TestSplits:
    def test_three_files_named_as_splits_often_are(self, tmp_path: Path, reviewers: Path) -> None:
        data = tmp_path / "reviews"
        data.mkdir()
        for seed, split in enumerate(("train", "dev", "test")):
            write_csv(data / f"{split}.csv", reviews("books", 20, seed))
        models = [reviewers / name for name in ("base", "books", "films")]
        [section] = proposed(tmp_path, *models, "--data", data)["evaluators"]
        assert section["splits"] == {"search": "train", "validation": "dev", "test": "test"}
        assert "divide" not in section["data"]

    def test_only_what_experts_were_not_trained_on_is_read(
        self, tmp_path: Path, reviewers: Path
    ) -> None:
        data = tmp_path / "reviews"
        data.mkdir()
        for seed, split in enumerate(("train", "test")):
            write_csv(data / f"{split}.csv", reviews("books", 20, seed))
        models = [reviewers / name for name in ("base", "books", "films")]
        [section] = proposed(tmp_path, *models, "--data", data)["evaluators"]
        assert section["data"] == {"file": str(data / "test.csv"), "divide": [0.6, 0.2, 0.2]}

    def test_names(self) -> None:
        assert split_roles(["Train", "val", "test"])["search"] == "Train"
        assert split_roles(["search", "train", "validation", "test"])["search"] == "search"
        assert split_roles(["train", "test"]) == {}


def test_a_file_for_each_expert(tmp_path: Path, reviewers: Path) -> None:
    data = tmp_path / "kinds"
    data.mkdir()
    for kind in ("books", "films"):
        rows = [{"review": row["review"], "stars": row["stars"]} for row in reviews(kind, 20, 1)]
        write_csv(data / f"{kind}.csv", rows)
    experts = [reviewers / name for name in ("books", "films")]
    study = proposed(tmp_path, *experts, "--base", reviewers / "base", "--data", data)
    [section] = study["evaluators"]
    assert [*section["data"]["file"]] == ["books", "films"]
    assert [one.get("reduce") for one in section["objectives"]] == [None, "worst"]
    assert study["operator"] == "ties"


def test_heads_are_found_by_their_classes(tmp_path: Path, viewers: Path, pictures: Path) -> None:
    models = [viewers / name for name in ("base", *PICTURES)]
    data = [x for name in PICTURES for x in ("--data", pictures / f"{name}-seen")]
    study = proposed(tmp_path, *models, *data)
    assert study["special"] == {"heads": "own"}
    [section] = study["evaluators"]
    assert section["experts"] == {f"{name}-seen": name for name in PICTURES}
    assert section["data"]["classes"] == {f"{n}-seen": [*c] for n, c in PICTURES.items()}
    alone = proposed(tmp_path, *models, "--data", pictures / "tones-seen", "--overwrite")
    assert alone["evaluators"][0]["head"] == "tones"


def test_adapters_and_arrays_of_a_datasets_folder(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    adapters = [pico_models / "adapters" / name for name in ("left", "right")]
    study = proposed(tmp_path, *adapters, "--data", pico_items)
    assert study["base"] == str(pico_models / "base")
    [section] = study["evaluators"]
    assert (section["input"], section["label"], section["domain"]) == ("pixels", "label", "domain")


def test_paths_start_at_the_study_and_programs_read_what_was_found(
    tmp_path: Path, reviewers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(reviewers)
    (tmp_path / "studies").mkdir()
    write_csv(tmp_path / "reviews.csv", reviews("books", 40, 1))
    arguments = ("init", "poet=models/books", "--base", "models/base", "--data", "reviews.csv")
    code, out, err = mergesearch(
        *arguments, "--out", "studies/one.yaml", "--name", "one", "--no-measure", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["base"] == {"path": "models/base", "reason": "named by --base"}
    assert told["experts"] == {"poet": "models/books"}
    assert told["data"][0]["columns"] == {"review": "text", "stars": "text", "kind": "text"}
    assert told["cost"] == "not asked for"
    assert told["check"]["items"] == {"search": 24, "validation": 8, "test": 8}
    assert told["next"][-1] == "mergesearch export runs/one --out one-merged"
    study = yaml.safe_load((tmp_path / "studies" / "one.yaml").read_text())
    assert study["experts"] == {"poet": "../models/books"}
    assert study["operator"] == "task_arithmetic"
    assert mergesearch("check", "studies/one.yaml")[0] == 0


class TestSize:
    @pytest.fixture
    def plan(self, tmp_path: Path, pico_models: Path, pico_items: Path) -> Any:
        return plan_study(load_study(write_study(model_study(pico_models, pico_items), tmp_path)))

    def test_trials_fill_the_time(self, plan: Any) -> None:
        cost = Cost(0.0, 0.5, 2.47, 24, 24, {})
        size = size_of(plan, cost, 10.0)
        assert cost.trial == pytest.approx(3.0)
        assert 120 <= size.trials < 200
        assert size.seconds is not None
        assert size.seconds <= 600
        assert size.why.startswith("About 3 s a trial on this machine")
        assert size_of(plan, cost, 20.0).trials > size.trials

    def test_no_more_trials_than_they_serve(self, plan: Any) -> None:
        assert size_of(plan, Cost(0.0, 0.0, 0.0, 24, 24, {}), 60.0).trials == ENOUGH

    def test_few_trials_have_few_coefficients_and_many_items_are_left_out(self, plan: Any) -> None:
        slow = size_of(plan, Cost(0.0, 1.0, 60.0, 24, 24, {}), 1.0)
        assert slow.trials == len(plan.anchors) + plan.recommended_trials + 10
        assert (slow.granularity, slow.dimensions) == ("task", 2)
        many = size_of(plan, Cost(0.0, 0.0, 60.0, 5000, 500, {}), 30.0)
        assert many.max_items is not None
        assert FEWEST_ITEMS <= many.max_items < 5000
        assert many.trials > size_of(plan, replace(_SLOW, items=0), 30.0).trials


_SLOW = Cost(0.0, 0.0, 60.0, 5000, 500, {})


def test_comments_leave_the_data_alone() -> None:
    keys = [
        Key("name", "a: b # c", "Why " * 60),
        Key("special", (Key("heads", "own", "Because."),)),
        Key("evaluators", [(Key("kind", "x"), Key("data", (Key("file", {"é": "1"}),)))]),
        Key("budget", {"trials": 3}),
    ]
    text = commented(keys)
    assert yaml.safe_load(text) == plain(keys)
    assert max(map(len, text.splitlines())) <= 96
