"""Checkpoints: what is read equals what was saved, and what is damaged is refused with its name."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging.checkpoints.locations import is_hub_name, short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError

FAMILIES = ("vit", "bert", "llama", "llama_tied", "llama_bf16", "gpt2", "resnet")


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_the_safetensors_library_reads(name, pico, read_tensors):
    folder = pico(name).base
    checkpoint = open_checkpoint(str(folder))
    reference = read_tensors(folder)
    assert set(checkpoint.tensors) == set(reference)
    for key, tensor in reference.items():
        read = checkpoint.read(key)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == checkpoint.tensors[key].shape
        assert torch.equal(read, tensor)


def test_names_the_checkpoint_and_reads_its_config(pico):
    folder = pico("vit").base
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.path, checkpoint.folder) == ("base", str(folder), folder)
    assert checkpoint.config["model_type"] == "vit"
    assert open_checkpoint(str(folder), "origin").name == "origin"


def test_names_are_in_natural_order(tmp_path):
    save_file({f"layers.{i}.w": torch.zeros(2) for i in (10, 9, 1)}, tmp_path / "x.safetensors")
    assert open_checkpoint(str(tmp_path / "x.safetensors")).names == (
        "layers.1.w",
        "layers.9.w",
        "layers.10.w",
    )


def test_shards_read_like_one_file_and_have_its_fingerprint(pico, tmp_path):
    family = pico("llama")
    model, _ = family.load(family.base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one = open_checkpoint(str(family.base))
    many = open_checkpoint(str(tmp_path / "shards"))
    assert one.merged == many.merged
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)
    assert one.fingerprint() == many.fingerprint()


def test_fingerprint_sees_one_changed_bit_a_renamed_and_a_reshaped_tensor(pico, copy_of):
    base = pico("vit").base

    def flip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["classifier.bias"].view(torch.int32)[0] ^= 1
        return tensors

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("classifier.bias", "classifier.other"): t for name, t in tensors.items()
        }

    def reshape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"classifier.bias": tensors["classifier.bias"][None]}

    prints = {
        open_checkpoint(str(copy_of(base, change))).fingerprint()
        for change in (flip, rename, reshape)
    }
    original = open_checkpoint(str(base)).fingerprint()
    assert len(prints | {original}) == 4
    assert open_checkpoint(str(copy_of(base))).fingerprint() == original


def test_writing_to_a_read_tensor_leaves_the_file_alone(pico):
    checkpoint = open_checkpoint(str(pico("vit").base))
    before = checkpoint.fingerprint()
    checkpoint.read("classifier.weight").zero_()
    assert checkpoint.read("classifier.weight").abs().sum() > 0
    assert open_checkpoint(checkpoint.path).fingerprint() == before


def test_reads_odd_places_empty_tensors_and_scalars(tmp_path):
    tensors = {
        "scale": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "odd": torch.arange(5, dtype=torch.float64),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    # The library pads headers to eight bytes; other writers need not.
    file.write_bytes(
        struct.pack("<Q", length + 3) + raw[8 : 8 + length] + b"   " + raw[8 + length :]
    )
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.folder is None
    assert checkpoint.config == {}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_integer_buffers_and_computed_constants_are_carried(pico, tmp_path):
    resnet = open_checkpoint(str(pico("resnet").base))
    assert resnet.carried
    assert all(name.endswith("num_batches_tracked") for name in resnet.carried)
    assert set(resnet.carried).isdisjoint(resnet.merged)

    tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.c_attn.bias": torch.ones(4),
        "blocks.0.attn.bias": torch.ones(4),  # learned: not the shape of a mask
        "mask": torch.ones(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert set(open_checkpoint(str(tmp_path / "x.safetensors")).names) == {
        "h.0.attn.c_attn.bias",
        "blocks.0.attn.bias",
    }


def _store_head(head: str, embedding: str) -> Any:
    return lambda tensors: tensors | {head: tensors[embedding].clone()}


@pytest.mark.parametrize(
    ("name", "head", "embedding"),
    [
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("llama_tied", "lm_head.weight", "model.embed_tokens.weight"),
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ],
)
def test_a_tied_tensor_that_is_stored_twice_is_merged_once(name, head, embedding, pico, copy_of):
    twice = open_checkpoint(str(copy_of(pico(name).base, _store_head(head, embedding))))
    once = open_checkpoint(str(pico(name).base))
    assert once.aliases == {}
    assert twice.aliases == {head: embedding}
    assert twice.merged == once.merged
    assert head not in twice.carried


def test_older_configurations_without_the_key_follow_the_family(pico, copy_of):
    head = "cls.predictions.decoder.weight"
    folder = copy_of(pico("bert").base, _store_head(head, "bert.embeddings.word_embeddings.weight"))
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert head in open_checkpoint(str(folder)).aliases


def test_an_untied_head_is_merged_by_itself(pico, copy_of):
    untied = open_checkpoint(str(pico("llama").base))
    assert untied.aliases == {}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(untied.merged)
    other_shape = copy_of(
        pico("llama_tied").base, lambda t: t | {"lm_head.weight": torch.zeros(4, 16)}
    )
    assert "lm_head.weight" in open_checkpoint(str(other_shape)).merged


def test_encoder_and_decoder_embeddings_are_copies_of_the_shared_one(tmp_path):
    import transformers

    settings = {
        "vocab_size": 32,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).save_pretrained(
            tmp_path
        )
    tensors = load_file(tmp_path / "model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    tensors |= {name: tensors["shared.weight"].clone() for name in copies}
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_checkpoint(str(tmp_path)).aliases == dict.fromkeys(copies, "shared.weight")


def test_tied_tensors_with_different_values_are_refused_when_weights_are_read(pico, copy_of):
    folder = copy_of(
        pico("gpt2").base, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}
    )
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' and 'transformer.wte.weight' to be equal"
    ):
        open_checkpoint(str(folder)).fingerprint()


def test_a_missing_tensor_is_named(pico):
    with pytest.raises(CheckpointError, match=r"received 'nothing'; there are classifier"):
        open_checkpoint(str(pico("vit").base)).read("nothing")


# --- refusals
# ----------------------------------------------------------------------------


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_path_and_empty_folder(tmp_path):
    assert "received a missing path" in _refusal(tmp_path / "nowhere")
    assert "received no weights" in _refusal(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_pickle_is_never_read(file, tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / file)
    for path in (tmp_path, tmp_path / file):
        message = _refusal(path)
        assert "pickle is never read" in message
        assert "safetensors" in message
        assert file in message
    assert not (tmp_path / "exploded").exists()


def test_adapters_other_weight_names_and_other_files(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "diffusion.safetensors")
    assert "diffusion.safetensors; give the path of one file" in _refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in _refusal(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    assert "expected a folder or a .safetensors file" in _refusal(tmp_path / "notes.md")


@pytest.fixture
def weights(pico, copy_of) -> Path:
    """A private copy's weight file, to be damaged."""
    return copy_of(pico("vit").base) / "model.safetensors"


def test_truncated_anywhere_is_refused(weights):
    raw = weights.read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for length in (0, 5, 8, header - 1, header, header + 1, len(raw) - 1):
        weights.write_bytes(raw[:length])
        assert "truncated" in _refusal(weights)


def test_surplus_bytes_and_git_lfs_pointers(weights):
    weights.write_bytes(weights.read_bytes() + b"more")
    assert "bytes that no tensor owns" in _refusal(weights)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in _refusal(weights)


def _write(file: Path, header: Any, data: bytes = b"\0" * 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32"}}',
        b'{"w": {"dtype": "F32", "shape": 2}}',
    ],
)
def test_broken_headers(header, tmp_path):
    _write(tmp_path / "x.safetensors", header)
    assert "broken JSON" in _refusal(tmp_path / "x.safetensors")


def test_unknown_dtype_and_wrong_sizes_name_the_tensor(tmp_path):
    file = tmp_path / "x.safetensors"
    _write(file, {"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}})
    message = _refusal(file)
    assert "'w'" in message
    assert "F8_E4M3" in message
    _write(file, {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}})
    assert "tensor 'w': expected 12 bytes for F32 [3], received 8" in _refusal(file)
    _write(file, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}})
    assert "damaged" in _refusal(file)


def test_shards_that_do_not_match_their_index(pico, tmp_path):
    family = pico("llama")
    family.load(family.base)[0].save_pretrained(tmp_path, max_shard_size="12KB")
    index_file = tmp_path / "model.safetensors.index.json"
    original = index_file.read_text()
    index = json.loads(original)
    shards = list(index["weight_map"].values())
    name, shard = next((n, s) for n, s in index["weight_map"].items() if shards.count(s) > 1)

    def refused_with(weight_map: Any) -> str:
        index_file.write_text(json.dumps({"weight_map": weight_map}))
        return _refusal(tmp_path)

    assert "'gone.safetensors'" in refused_with(index["weight_map"] | {name: "gone.safetensors"})
    assert "received no such file" in refused_with(
        index["weight_map"] | {name: f"../{tmp_path.name}/{shard}"}
    )
    assert "expected tensor 'ghost'" in refused_with(index["weight_map"] | {"ghost": shard})
    assert f"{name!r}: expected the index" in refused_with(
        {k: v for k, v in index["weight_map"].items() if k != name}
    )
    assert "weight_map" in refused_with(None)
    index_file.write_text(original[:-30])
    assert "readable JSON" in _refusal(tmp_path)
    index_file.write_text(original)
    (tmp_path / shard).unlink()
    assert shard in _refusal(tmp_path)


def test_broken_config(weights):
    (weights.parent / "config.json").write_text("{")
    assert "config.json: expected readable JSON" in _refusal(weights.parent)
    (weights.parent / "config.json").write_text("[]")
    assert "expected a JSON object, received list" in _refusal(weights.parent)


# --- the model hub
# ----------------------------------------------------------------------------


def test_hub_models_come_from_the_cache(hub, pico):
    checkpoint = open_checkpoint("org/tiny@v1")
    assert (checkpoint.name, checkpoint.path) == ("tiny", "org/tiny@v1")
    assert checkpoint.fingerprint() == open_checkpoint(str(pico("vit").base)).fingerprint()


def test_hub_failures_say_what_to_do(hub):
    for path in ("org/tiny@v2", "org/unknown", "org/tiny"):
        message = _refusal(Path(path))
        assert "HF_HUB_OFFLINE" in message


def test_a_local_folder_wins_over_a_hub_name(hub, pico, monkeypatch):
    monkeypatch.chdir(hub)
    (hub / "org").mkdir()
    (hub / "org" / "tiny").symlink_to(pico("bert").base)
    assert open_checkpoint("org/tiny").config["model_type"] == "bert"


def test_what_reads_as_a_hub_name():
    assert all(map(is_hub_name, ("org/name", "org/na-me_1.5@main", "org/name@refs/pr/1")))
    assert not any(
        map(
            is_hub_name,
            ("name", "/org/name", "./org/name", "org/name/more", "~/name", "../x", "org/"),
        )
    )
    assert short_name("org/name@main") == "name"
    assert short_name("/models/rotated/") == "rotated"
    assert short_name("/models/x.safetensors") == "x"


def test_opening_a_checkpoint_loads_no_torch(pico):
    code = (
        "import sys\n"
        "from mergesearch.merging.checkpoints.opening import open_checkpoint\n"
        "from mergesearch.merging.family.preflight import check_family\n"
        "import mergesearch.merging.recipe_file, mergesearch.merging.export, "
        "mergesearch.merging.export.model_card\n"
        "base = open_checkpoint(sys.argv[1]); check_family(base, [base]); base.fingerprint()\n"
        "assert not {'torch', 'transformers', 'safetensors', 'huggingface_hub', 'numba'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(pico("vit").base)], check=True)
