"""Experts of another origin are refused by every verb that would merge them, unless asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import model_study, pico_config
from tests.search.studies import write_study

REASON = "a control without a common start"


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ViTs of other seeds, as base and ``right``, and a fine-tuned expert ``left``."""
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("strangers")
    config = pico_config(32)
    with torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(("base", "right")):
            torch.manual_seed(seed)
            model = ViTForImageClassification(config)
            model.save_pretrained(folder / name)
            if name == "base":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.002 * torch.randn(parameter.shape))
                model.save_pretrained(folder / "left")
    return folder


@pytest.fixture
def study(strangers: Path, pico_items: Path, tmp_path: Path) -> Path:
    return write_study(
        model_study(
            strangers,
            pico_items,
            budget={"trials": 8},
            strategy="sobol",
            space={"granularity": "task"},
        ),
        tmp_path,
    )


def test_check_and_run_refuse_before_anything_is_written(
    study: Path, strangers: Path, tmp_path: Path
) -> None:
    message = refused("check", study)
    assert message.startswith(f"expert 'right' ({strangers / 'right'}): expected weights trained ")
    assert "received cosines of " in message
    assert message.endswith('or set allow_unrelated: "REASON" in the study')
    assert refused("run", study, "--run", tmp_path / "run") == message
    assert not (tmp_path / "run").exists()


def test_a_study_that_says_why_is_run_and_records_it(study: Path, tmp_path: Path) -> None:
    allowed = ("--set", f"allow_unrelated={REASON}")
    code, out, err = mergesearch("check", study, *allowed)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("lineage ")]
    assert lines[0].startswith("lineage     left: fine-tuned, cosine 0.99")
    assert "attention 0.9" in lines[0]
    assert "query-key products 0.9" in lines[0]
    assert lines[1].startswith("lineage     right: unrelated, cosine ")
    warning = next(line for line in out.splitlines() if line.startswith("warning "))
    assert warning.endswith(f"merged all the same, as asked: {REASON}")
    checked = json.loads(mergesearch("check", study, *allowed, "--json")[1])
    assert [one["kind"] for one in checked["lineage"]] == ["fine-tuned", "unrelated"]
    assert any(REASON in line for line in checked["warnings"])

    run = tmp_path / "run"
    for _ in range(2):  # a resumed run says the same
        code, _, err = mergesearch("run", study, *allowed, "--run", run, "--progress", "plain")
        assert code == 0, err
        assert REASON in err
    assert yaml.safe_load((run / "study.yaml").read_text())["allow_unrelated"] == REASON
    assert REASON in (run / "report.html").read_text()
    exported = ("export", run, "--out", tmp_path / "best", "--no-rescore")
    code, _, err = mergesearch(*exported)
    assert code == 0, err
    assert REASON in (tmp_path / "best" / "README.md").read_text()


def test_merge_asks_for_a_reason_and_the_card_gives_it(strangers: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    sources = {"base": str(strangers / "base"), "experts": [str(strangers / "right")]}
    recipe.write_text(yaml.safe_dump({**sources, "operator": "average"}))
    message = refused("merge", recipe, "--out", tmp_path / "out")
    assert message.endswith('or say why with --allow-unrelated "REASON"')
    assert not (tmp_path / "out").exists()
    code, out, err = mergesearch(
        "merge", recipe, "--out", tmp_path / "out", "--allow-unrelated", REASON, "--json"
    )
    assert code == 0, err
    assert REASON in json.loads(out)["warnings"][0]
    assert REASON in (tmp_path / "out" / "README.md").read_text()


def test_compare_weights_prints_a_table(strangers: Path) -> None:
    base = strangers / "base"
    code, out, err = mergesearch("compare-weights", base, strangers / "left")
    assert code == 0, err
    assert "\nverdict   fine-tuned\n" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["role"] == ["parameters", "cosine", "distance", "scale"]
    assert float(rows["attention"][1]) > 0.98
    assert float(rows["query-key"][2]) > 0.98
    code, out, err = mergesearch("compare-weights", base, strangers / "right", "--json")
    compared = json.loads(out)
    assert compared["kind"] == "unrelated"
    assert abs(compared["roles"]["attention"]["cosine"]) < 0.1
    assert compared["refused"]


def test_compare_weights_finds_names_behind_another_prefix(strangers: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(strangers / "base" / "model.safetensors")
    bare = {n.removeprefix("vit."): t for n, t in tensors.items() if n.startswith("vit.")}
    save_file(bare, tmp_path / "bare.safetensors")
    args = (tmp_path / "bare.safetensors", strangers / "left", "--json")
    code, out, err = mergesearch("compare-weights", *args)
    assert code == 0, err
    assert json.loads(out)["kind"] == "fine-tuned"


def test_compare_weights_refuses_what_cannot_be_compared(strangers: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    message = refused("compare-weights", strangers / "base", tmp_path / "other.safetensors")
    assert message.endswith("compare checkpoints of one architecture")
    assert "missing" in refused("compare-weights", tmp_path / "nowhere", strangers / "base")
