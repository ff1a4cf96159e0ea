"""Pickled weights become folders of safetensors that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.export.converting import convert


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Any]:
    """A tiny BERT with its tied head as transformers used to save it, and the model."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                architectures=["BertForMaskedLM"],
            )
        ).eval()
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save({"lr": 1e-3}, folder / "training_args.bin")
    model.config.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    return folder, model


def test_a_folder_becomes_one_that_transformers_loads(
    pickled: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM

    folder, model = pickled
    with pytest.raises(CheckpointError, match=r"`mergesearch convert PATH --out FOLDER`"):
        open_checkpoint(str(folder))
    done = convert(folder, tmp_path / "new", shard_bytes=2000)
    assert done.left == done.warnings == ()
    new = open_checkpoint(str(done.folder))
    assert len(new.files) > 1
    expected = model.state_dict()
    assert {*new.tensors} == {*expected}
    assert all(torch.equal(new.read(name), tensor) for name, tensor in expected.items())
    assert new.aliases["cls.predictions.decoder.weight"].endswith("word_embeddings.weight")
    inputs = torch.arange(6)[None]
    loaded = AutoModelForMaskedLM.from_pretrained(done.folder)
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)
    assert {p.name for p in done.folder.iterdir() if p.suffix != ".safetensors"} == {
        *("config.json", "vocab.txt", "model.safetensors.index.json")
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_and_single_files(pickled: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = pickled
    state = model.state_dict()
    one = convert(folder / "pytorch_model.bin", tmp_path / "one")
    assert (one.folder / "config.json").is_file()
    (folder / "pytorch_model.bin").unlink()
    shard_of = {}
    for number, name in enumerate(state):
        shard_of[name] = f"pytorch_model-{number % 2}.bin"
    for shard in {*shard_of.values()}:
        part = {name: tensor for name, tensor in state.items() if shard_of[name] == shard}
        torch.save(part, folder / shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": shard_of}))
    two = convert(folder, tmp_path / "two")
    fingerprints = {open_checkpoint(str(done.folder)).fingerprint() for done in (one, two)}
    assert len(fingerprints) == 1
    index.write_text(json.dumps({"weight_map": shard_of | {"more": "pytorch_model-0.bin"}}))
    with pytest.raises(CheckpointError, match="expected 'more', received none"):
        convert(folder, tmp_path / "three")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    with pytest.raises(CheckpointError, match=r"received no '\.\./outside\.bin'"):
        convert(folder, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_an_adapter_stays_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.save({"a.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text("{}")
    done = convert(folder, tmp_path / "new")
    assert {path.name for path in done.folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "steps": 3}, tmp_path / "last.ckpt")
    done = convert(tmp_path / "last.ckpt", tmp_path / "out")
    assert done.left == ("steps",)
    assert "no config.json" in done.warnings[0]
    (tmp_path / "config.json").write_text("{}")
    named = convert(tmp_path / "last.ckpt", tmp_path / "named")
    assert 'names no "model_type"' in named.warnings[0]


def test_wrong_places(pickled: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = pickled
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "several").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, tmp_path / "several" / name)
    done = convert(folder, tmp_path / "done").folder
    for source, out, overwrite, expected in (
        (tmp_path / "nowhere", "x", False, "received a missing path"),
        (tmp_path / "full", "x", False, "received none; give a folder with weights"),
        (tmp_path / "full" / "notes", "x", False, r"expected one of \*\.bin"),
        (tmp_path / "several", "x", False, r"received a\.pt, b\.pt; give the path of one file"),
        (done, "x", False, "received safetensors; they need no conversion"),
        (folder, "full", False, "received files; choose another or overwrite"),
        (folder, "old", True, "expected another folder than that of"),
    ):
        with pytest.raises(InputError, match=expected):
            convert(source, tmp_path / out, overwrite=overwrite)
    assert (folder / "pytorch_model.bin").is_file()
