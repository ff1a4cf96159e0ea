"""Pico models of real families, built and saved by transformers, for tests end to end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 96
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_VIT: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_RESNET: dict[str, Any] = {
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 3,
}

#: Family -> (model class, configuration class, configuration, dtype).
_FAMILIES: Mapping[str, tuple[str, str, dict[str, Any], torch.dtype]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT, torch.float32),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT, torch.float32),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT, torch.float32),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "tie_word_embeddings": True},
        torch.float32,
    ),
    "llama_bf16": ("LlamaForCausalLM", "LlamaConfig", _TEXT, torch.bfloat16),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, **_TOKENS}, torch.float32),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        _RESNET,
        torch.float32,
    ),  # has integer buffers
}


@dataclass(frozen=True)
class Family:
    """A saved base and two saved experts of it, with the transformers class that loads them."""

    model_class: str
    base: Path
    experts: tuple[Path, Path]

    def load(self, folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model in ``folder`` and transformers' account of missing and unexpected keys."""
        import transformers

        loaded = getattr(transformers, self.model_class).from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
        return loaded[0], loaded[1]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder's safetensors files."""
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All tensors of a folder, read with the safetensors library.

    It is the reference for our own reader.
    """
    return stored


@pytest.fixture(scope="session")
def build_model() -> Callable[..., torch.nn.Module]:
    """``build_model(family, seed=0, **changes)``: a pico model of the family.

    ``changes`` are other configuration values.
    """
    return _build


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """``pico("vit")``: the family of that name, built when first asked for.

    Not to be written to.
    """
    root = tmp_path_factory.mktemp("pico")
    built: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in built:
            built[name] = _save_family(root / name, name)
        return built[name]

    return get


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """``copy_of(folder, change=..., **settings)``: a changed copy in ``tmp_path``.

    ``change`` maps the dictionary of tensors to the one to store, ``settings`` are set in
    ``config.json``.
    """

    def copy(
        folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] = dict, **settings: Any
    ) -> Path:
        out = tmp_path / f"{folder.name}-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        save_file(change(stored(folder)), out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | settings))
        return out

    return copy


@pytest.fixture
def hub(pico: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model, ``org/tiny``, at revision ``v1``; the hub is out of reach."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "v1").write_text(commit)
    (model / "snapshots").mkdir()
    (model / "snapshots" / commit).symlink_to(pico("vit").base)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def _build(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    import transformers

    model_class, config_class, settings, dtype = _FAMILIES[name]
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**(settings | changes))
        )
    return model.to(dtype)


def _save_family(root: Path, name: str) -> Family:
    base = _build(name)
    base.save_pretrained(root / "base")
    for expert, seed in (("one", 1), ("two", 2)):
        _fine_tuned(base, seed).save_pretrained(root / expert)
    return Family(_FAMILIES[name][0], root / "base", (root / "one", root / "two"))


def _fine_tuned(base: torch.nn.Module, seed: int) -> Any:
    import copy

    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(
                parameter.dtype
            )
        for buffer in expert.buffers():
            if not buffer.is_floating_point():
                buffer += seed
    return expert
