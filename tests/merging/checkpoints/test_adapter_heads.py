"""Heads that adapters store whole: against peft's own models, and what cannot be made whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import CheckpointError
from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.models.loading import load_model
from tests.merging.checkpoints.test_adapter import GOLDEN, opened, pair, write_adapter
from tests.merging.headed import labelled

CLASS = "AutoModelForSequenceClassification"
COUNTS = {"distilbert": 3, "roberta": 5}
Copy = Callable[..., Path]


def golden(name: str) -> AdaptedCheckpoint:
    return opened(f"{GOLDEN / name}+{GOLDEN / name / 'adapter'}")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of an adapter that can be changed."""
    return Path(shutil.copytree(GOLDEN / "roberta" / "adapter", tmp_path / "adapter"))


@pytest.mark.parametrize("name", COUNTS)
def test_the_adapted_class_is_peft_s_model(name: str, tmp_path: Path) -> None:
    adapted = golden(name)
    merged = load_file(GOLDEN / name / "merged.safetensors")
    stored = {adapted.stored_as.get(n, n): adapted.read(n) for n in adapted.tensors}
    assert {*merged} <= {*stored}
    for key, tensor in merged.items():
        torch.testing.assert_close(stored[key], tensor, rtol=0, atol=1e-6)
    assert adapted.config["architectures"][0].endswith("ForSequenceClassification")
    # The same from a folder that peft's tensors make.
    save_file(stored | merged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(dict(adapted.config)))
    tokens = torch.tensor([[2, 5, 7, 3]])
    ours = load_model(adapted.path, CLASS)
    expected = load_model(str(tmp_path), CLASS)(tokens).logits
    assert expected.shape == (1, COUNTS[name])
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=0, atol=1e-6)


def test_tensors_that_the_class_lacks_are_left_out() -> None:
    adapted = golden("distilbert")
    base = open_checkpoint(str(GOLDEN / "distilbert"))
    gone = {*base.tensors} - {*adapted.tensors}
    assert gone
    assert all(name.startswith("vocab_") for name in gone)
    assert {*adapted.saved} == {*adapted.tensors} - {*base.tensors}
    assert adapted.fingerprint() != base.fingerprint()


def test_a_base_without_a_prefix_keeps_its_names() -> None:
    adapted = golden("roberta")
    name = "encoder.layer.0.attention.self.query.weight"
    assert adapted.stored_as[name] == f"roberta.{name}"
    pair = adapted.low_rank(name, open_checkpoint(str(GOLDEN / "roberta")))
    assert pair is not None
    assert pair[0].shape == (8, 2)


def test_more_classes_than_features(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = "base_model.model.classifier.out_proj"
    tensors |= {f"{head}.weight": torch.ones(11, 8), f"{head}.bias": torch.ones(11)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert len(opened(f"{GOLDEN / 'roberta'}+{adapter}").config["id2label"]) == 11


def test_the_folder_of_an_adapter_may_name_the_classes(adapter: Path) -> None:
    labels = labelled(["a", "b", "c", "d", "e"])
    (adapter / "config.json").write_text(json.dumps(labels))
    adapted = opened(f"{GOLDEN / 'roberta'}+{adapter}")
    assert adapted.config["id2label"] == labels["id2label"]
    assert adapted.config["architectures"] == ["RobertaForSequenceClassification"]


def test_another_number_of_classes_than_the_base_s(pico: Any, tmp_path: Path) -> None:
    """The base's head is replaced; transformers would keep a random one in its place."""
    base = pico("vit").base
    head = {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.arange(5.0)}
    adapter = write_adapter(
        tmp_path / "five",
        pair(16, 16, module="vit.layers.0.attention.q_proj") | head,
        modules_to_save=["classifier"],
        auto_mapping={"base_model_class": "ViTForImageClassification"},
    )
    model: Any = load_model(f"{base}+{adapter}", "AutoModelForImageClassification")
    assert model.config.num_labels == 5
    assert torch.equal(model.classifier.bias, torch.arange(5.0))


def test_weights_that_were_random_in_training_are_refused(pico: Any, tmp_path: Path) -> None:
    head = {"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.ones(2)}
    module = "bert.encoder.layer.0.attention.self.query"
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    adapter = write_adapter(tmp_path / "mood", pair(16, 16, module=module) | head, **settings)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{pico('bert').base}+{adapter}")
    message = str(caught.value)
    assert "every weight of BertForSequenceClassification" in message
    assert "none of 'bert.pooler.dense.bias', 'bert.pooler.dense.weight'" in message
    assert "add their modules to modules_to_save" in message
    assert "\n" not in message


def test_whole_tensors_that_are_no_head_still_need_a_home(pico: Any, tmp_path: Path) -> None:
    other = {"model.layers.7.mlp.down_proj.weight": torch.ones(2, 2), "lm_head.bias": torch.ones(9)}
    for name, tensor in other.items():
        adapter = write_adapter(
            tmp_path / name, pair(16, 16) | {name: tensor}, modules_to_save=["down_proj"]
        )
        with pytest.raises(CheckpointError, match="tensors that the model does not store"):
            open_checkpoint(f"{pico('llama').base}+{adapter}")
