"""``check`` plans the cards of a study, and ``doctor`` says where there are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.headers import LLAMA_8B, write_llama
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import model_study
from tests.search.studies import analytic, write_study
from tests.test_architecture import SLOW, loaded_by

without_card = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="is about machines without a card"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 8B and four experts, whose weights are holes."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("8b")
    experts = {name: str(write_llama(folder / name, LLAMA_8B)) for name in "abcd"}
    splits = {
        split: Dataset.from_dict({"input_ids": [[1, 2, 3]], "id": [split]})
        for split in ("search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(folder / "data")
    data = {
        "name": "large",
        "base": str(write_llama(folder / "base", LLAMA_8B)),
        "experts": experts,
        "operator": "ties",
        "strategy": "cma_es",
        "evaluators": [
            {"kind": "language_model", "data": str(folder / "data"), "id": "id", "batch_size": 8}
        ],
        "budget": {"trials": 30},
    }
    return write_study(data, folder)


def test_check_answers_for_cards_that_are_not_here(study: Path) -> None:
    code, out, err = mergesearch("check", study, "--card", "h200-141", "--count", 8)
    assert code == 0, err
    assert "cards       8 x h200-141, 145.6 GB usable, 1 worker on each, 6 would fit\n" in out
    assert (
        "rows        packed, exact: the smallest exact form of ties, of which rows keep 20%" in out
    )
    assert "base 16.1 GB, rows 18.9 GB, merged 16.1 GB" in out
    code, out, _ = mergesearch("check", study, "--card", "h200-141", "--count", 8, "--json")
    checked = json.loads(out)
    cards = checked["cards"]
    assert (
        checked["memory"]["shared"]
        == cards["node"]["disk"]
        == cards["cards"][0]["base"] + sum(cards["rows"]["by_encoding"].values())
    )
    assert checked["memory"]["worker"] == cards["cards"][0]["merged"]
    assert cards["fits"]
    assert cards["peak"] == sum(size for name, size in cards["cards"][0].items() if name != "total")
    assert cards["rows"]["exact"]
    assert cards["why"].startswith("packed, exact")


def test_check_of_8b_loads_nothing_heavy(study: Path) -> None:
    """It reads headers and tables: neither torch nor transformers has a part in it."""
    assert loaded_by(("check", str(study)), SLOW) == []


def test_check_says_how_long_preparing_takes_on_each_device(study: Path) -> None:
    """Headers alone are there, so that nothing is prepared; torch is not needed to say it."""
    by_tsv = ("--set", "operator=tsv", "--set", "rows=int8", "--card", "h200-141")
    code, out, err = mergesearch("check", study, *by_tsv)
    assert code == 0, err
    found = re.search(
        r"^preparing   about (\S+) h on 1 core of this machine, "
        r"about (\d+) min on h200-141 \(workers\.prepare: card\)$",
        out,
        re.M,
    )
    assert found is not None, out
    _, out, _ = mergesearch("check", study, "--json", "--card", "h200-141")
    preparing = json.loads(out)["preparing"]
    # TIES reads the base and four experts of 16 GB three times at 2 GB/s, wherever.
    assert preparing["seconds"] == preparing["card_seconds"]
    assert preparing["seconds"] == pytest.approx(3 * 5 * 2 * 8.03 / 2, rel=0.01)
    assert (preparing["measured"], preparing["card"]) == (False, "h200-141")


def test_check_refuses_with_the_setting_that_would_fit(study: Path) -> None:
    assert mergesearch("check", study, "--card", "80")[0] == 0
    masked = ("--set", "rows=masked")
    message = refused("check", study, "--card", "80", *masked)
    assert "expected at most 77.6 GB on each of 1 card (80 GB), received 10" in message
    assert message.endswith("; set rows: int8")
    settings = ("--set", "rows=int8")
    assert mergesearch("check", study, "--card", "80", *settings)[0] == 0
    message = refused("check", study, "--card", "a100-80", "--count", 2, *masked)
    assert message.endswith("; set workers.gpus: 2 or rows: int8")


@pytest.mark.slow
def test_check_refuses_what_is_no_card(study: Path) -> None:
    assert "received 'h9000'" in refused("check", study, "--card", "h9000")
    assert "--count: expected --card beside it" in refused("check", study, "--count", 2)


@without_card
@pytest.mark.slow
def test_check_says_which_card_would_do_where_there_is_none(study: Path) -> None:
    masked = ("--set", "rows=masked")
    code, out, err = mergesearch("check", study, "--set", "workers.gpus=1", *masked)
    assert code == 2
    assert "workers.gpus: expected 1 GPU here, found none that torch can use" in err
    assert "cards       none here; 10" in out
    assert "the smallest that fits is h200-141; plan with --card" in out
    assert "cards  " not in mergesearch("check", study)[1]


def test_studies_without_a_model_have_no_cards(tmp_path: Path) -> None:
    study = write_study(analytic(), tmp_path)
    code, out, err = mergesearch("check", study, "--card", "l4-24", "--json")
    assert code == 0, err
    assert json.loads(out)["cards"] is None


@without_card
def test_doctor_says_that_there_is_no_card(
    tmp_path: Path, pico_models: Path, pico_items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = write_study(model_study(pico_models, pico_items), tmp_path)
    code, out, _ = mergesearch("doctor", study)
    assert "ok    gpus      none (torch" in out
    assert code == 0, out
    for setting, asked in (("gpus=1", "gpus: 1"), ("per_gpu=2", "per_gpu: 2")):
        code, out, _ = mergesearch("doctor", study, "--set", f"workers.{setting}")
        assert code == 1
        assert (
            f"fail  gpus      no card: expected one that torch can use for workers.{asked}" in out
        )
