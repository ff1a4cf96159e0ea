"""The zoo of a mixture of experts: one model, its questions, and copies at the beginning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.zoo.moe import Settings, build_moe, load_model, new_model, upcycle
from experiments.zoo.skills import Training
from experiments.zoo.skills_data import SKILLS

TINY = Settings(
    training=Training(steps=4, rate=1e-3, batch=4),
    questions={"search": 4, "validation": 4, "test": 4},
    examples=40,
    calibration=3,
    width=16,
    inner=16,
    blocks=1,
    experts=4,
    upcycled=2,
)


def test_experts_begin_as_copies_of_the_only_one() -> None:
    dense = new_model(replace(TINY, experts=1, used=1), 40)
    model = new_model(TINY, 40)
    router = model.state_dict()["model.layers.0.mlp.gate.weight"].clone()
    upcycle(model, dense)
    weights = model.state_dict()
    one = dense.state_dict()["model.layers.0.mlp.experts.down_proj"][0]
    assert weights["model.layers.0.mlp.experts.down_proj"].shape[0] == 4
    assert all(torch.equal(own, one) for own in weights["model.layers.0.mlp.experts.down_proj"])
    assert torch.equal(weights["model.layers.0.mlp.gate.weight"], router)
    assert torch.equal(weights["lm_head.weight"], dense.state_dict()["lm_head.weight"])


@pytest.mark.slow
def test_a_whole_zoo_has_a_model_items_and_tasks(tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = build_moe(tmp_path / "zoo", TINY)
    assert load_model(folder / "base").config.num_local_experts == 4
    items = load_from_disk(str(folder / "data" / "calibration"))["train"]
    assert len(items) == 3 * (1 + len(SKILLS))
    assert all(len(row["input_ids"]) == len(row["attention_mask"]) for row in items)
    assert (folder / "tasks").is_dir()
    written = json.loads((folder / "manifest.json").read_text())
    assert written["settings"]["upcycled"] == 2
    before = (folder / "base" / "model.safetensors").stat().st_mtime_ns
    build_moe(tmp_path / "zoo", TINY)
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns == before
