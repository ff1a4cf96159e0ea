"""`mergesearch convert`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.search.cli.test_cli import mergesearch, refused


def test_it_says_what_it_wrote_and_what_it_left(tmp_path: Path) -> None:
    states = {"model": {"w": torch.ones(2, 3)}, "ema": {"w": torch.zeros(2, 3), "steps": 3}}
    file = tmp_path / "last.ckpt"
    torch.save(states, file)
    code, out, _ = mergesearch("convert", file, "--out", tmp_path / "ema", "--key", "ema", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["tensors"], told["bytes"], told["left"]) == (1, 24, ["steps"])
    text = mergesearch("convert", file, "--out", tmp_path / "model", "--key", "model")[1]
    assert text.startswith("wrote 1 tensor, 0.0 MB, to ")
    assert "warning: no config.json beside the weights" in text
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_wrong_input_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    message = refused("convert", tmp_path / "x.pt", "--out", tmp_path / "new")
    assert message.endswith("received several (there are: a, b); name one with --key")
    assert not (tmp_path / "new").exists()
