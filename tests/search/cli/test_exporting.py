"""What `export` and `merge` write beside a model: fronts, other dtypes, cards, uploads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from mergesearch.search.cli.storing_options import parse_size
from mergesearch.search.runs.opened import open_run
from tests.merging.export.fake_hub import fake_hub
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import model_study
from tests.search.studies import write_study


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pico_models: Path, pico_items: Path) -> Path:
    """A finished study of two objectives."""
    folder = tmp_path_factory.mktemp("exporting")
    data = model_study(pico_models, pico_items, budget={"trials": 8})
    study = write_study(data | {"space": {"granularity": "task"}}, folder)
    code, _, err = mergesearch("run", study, "--run", folder / "run")
    assert code == 0, err
    return folder / "run"


def test_every_member_of_the_front_has_a_numbered_folder(run: Path, tmp_path: Path) -> None:
    front = json.loads(mergesearch("show", run, "--front", "--json")[1])
    code, out, err = mergesearch("export", run, "--front", "--out", tmp_path / "front", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [each["trial"] for each in told["front"]] == [trial["number"] for trial in front]
    assert told["agrees"] is True
    names = sorted(path.name for path in (tmp_path / "front").iterdir())
    assert names == [f"{i:02d}-trial-{t['number']}" for i, t in enumerate(front, 1)]
    assert all((tmp_path / "front" / name / "model.safetensors").is_file() for name in names)
    assert refused("export", run, "--front", "--trial", 0, "--out", tmp_path / "x").startswith(
        "--front: expected"
    )


def test_the_card_of_a_winner_has_its_held_out_results(run: Path, tmp_path: Path) -> None:
    code, out, err = mergesearch("export", run, "--out", tmp_path / "best", "--json")
    assert code == 0, err
    number = json.loads(out)["trial"]
    card = ModelCard((tmp_path / "best" / "README.md").read_text())
    results = card.data.eval_results
    assert results is not None
    values = {each.metric_type: each.metric_value for each in results}
    verdict = open_run(run).verdict
    assert verdict is not None
    score = verdict.scores["test"][number]
    errors = {f"{name}_stderr": error for name, error in score.errors.items()}
    assert values == {**score.values, **errors}
    assert set(values) == {"odd", "odd_stderr", "even", "even_stderr"}
    assert card.data.pipeline_tag == "image-classification"
    assert f"mergesearch export RUN --trial {number} --out merged-model" in card.text
    assert "operator: task_arithmetic" in card.text


def test_another_dtype_is_scored_but_not_compared(run: Path, tmp_path: Path) -> None:
    code, out, err = mergesearch(
        *("export", run, "--out", tmp_path / "half", "--dtype", "bfloat16", "--shard-size", "2KB")
    )
    assert code == 0, err
    assert "(stored as bfloat16, so not compared with the record)" in out
    shards = sorted((tmp_path / "half").glob("*.safetensors"))
    assert len(shards) > 1
    assert {str(t.dtype) for t in load_file(shards[0]).values()} == {"torch.bfloat16"}


def test_an_upload_is_listed_and_then_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("export", run, "--no-rescore", "--push-to", "org/best", "--out")
    code, out, err = mergesearch(*options, tmp_path / "dry", "--dry-run")
    assert code == 0, err
    assert "files for org/best, nothing was uploaded" in out
    assert "warning: README.md, recipe.yaml, recipe.json name folders" in out
    with fake_hub(monkeypatch) as hub:
        code, out, err = mergesearch(*options, tmp_path / "best")
        assert code == 0, err
        assert "uploaded to org/best, private: http" in out
        assert {*hub.repositories["org/best"].files} == {
            path.name for path in (tmp_path / "best").iterdir()
        }
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        assert refused(*options, tmp_path / "late").startswith("--push-to: expected org/best")
    assert not (tmp_path / "late").exists()  # refused before it was merged
    assert "beside it" in refused("export", run, "--out", tmp_path / "late", "--dry-run")


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "much", "-1GB", ""])
def test_sizes_that_are_none(text: str, run: Path, tmp_path: Path) -> None:
    options = ("export", run, "--out", tmp_path / "x", f"--shard-size={text}")
    assert "--shard-size: expected a size such as 2GB" in refused(*options)
