"""Llama-shaped models with random weights in bf16, and studies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.gpu_check.arenas import WEIGHTS, llama_shapes
from experiments.gpu_check.check import Machine, Skipped
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.workers.messages import WorkerSpec

EXPERTS = ("a", "b", "c", "d")

#: Layers at full scale.
LAYERS = 4

#: Tokens of a text at full scale, and texts of a split.
TOKENS = 512
TEXTS = 64

#: What base, rows and merged weights may take of a card.
SHARE = 0.6


def config_of(machine: Machine) -> dict[str, Any]:
    """The configuration of the largest of these models that fits."""
    hidden = machine.hidden
    groups = max(1, hidden // 512)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 8 * hidden,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": _layers(machine),
        "num_attention_heads": 4 * groups,
        "num_key_value_heads": groups,
        "max_position_embeddings": tokens_of(machine),
        "tie_word_embeddings": False,
    }


def tokens_of(machine: Machine) -> int:
    """Tokens of a text."""
    return max(32, int(TOKENS * min(1.0, machine.scale**0.5)))


def _layers(machine: Machine) -> int:
    """Layers of a model that fits on the card, with its experts and its merge.

    Raises:
        Skipped: If not even one fits, or the disk has no room.
    """
    memory = machine.memory()
    machine.folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(machine.folder).free
    for layers in range(max(2, int(LAYERS * min(machine.scale, 8.0))), 0, -1):
        size = model_bytes(machine.hidden, layers)
        on_card = (len(EXPERTS) + 2) * size
        on_disk = 3 * (len(EXPERTS) + 1) * size  # the models, and arenas of two operators
        if (memory is None or on_card < SHARE * memory[1]) and on_disk < 0.8 * disk:
            return layers
    raise Skipped(
        f"a model of one layer takes {on_card:,} bytes of the card and {on_disk:,} of the disk, "
        "which are not there"
    )


def model_bytes(hidden: int, layers: int) -> int:
    """Bytes of a model in bf16."""
    shapes = llama_shapes(hidden, layers, 8 * hidden).values()
    return 2 * sum(int(np.prod(shape)) for shape in shapes)


def models(machine: Machine) -> Path:
    """The folder of base, experts and texts, which are written once."""
    folder = machine.folder / "models"
    done = folder / "done"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    config = config_of(machine)
    generator = torch.Generator(machine.device).manual_seed(0)
    for name in ("base", *EXPERTS):
        _write_model(folder / name, config, 0.0 if name == "base" else 0.05, generator)
    _write_texts(folder / "texts", config)
    done.touch()
    return folder


def _write_model(
    folder: Path, config: dict[str, Any], change: float, generator: torch.Generator
) -> None:
    """A model near the base, whose weights are the same numbers for all models."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    device = generator.device
    common = torch.Generator(device).manual_seed(1)
    state = {}
    shapes = llama_shapes(config["hidden_size"], config["num_hidden_layers"], config["vocab_size"])
    for name, shape in shapes.items():
        numbers = torch.randn(shape, device=device, generator=common)
        if change:
            numbers += change * torch.randn(shape, device=device, generator=generator)
        numbers *= WEIGHTS
        if len(shape) == 1:
            numbers += 1  # norms
        state[name] = numbers.bfloat16().cpu()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_texts(folder: Path, config: dict[str, Any]) -> None:
    """Texts of random tokens, all of one length."""
    from datasets import Dataset, DatasetDict

    generator = np.random.default_rng(0)
    size = (TEXTS, config["max_position_embeddings"])
    splits = {
        split: Dataset.from_dict(
            {
                "input_ids": generator.integers(0, config["vocab_size"], size).tolist(),
                "id": [f"{split} {text}" for text in range(TEXTS)],
            }
        )
        for split in ("search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(folder)


def planned_study(machine: Machine, operator: str, batch_size: int) -> Plan:
    """A study of the models on one card."""
    folder = models(machine)
    evaluator = {
        "kind": "language_model",
        "data": "texts",
        "id": "id",
        "batch_size": batch_size,
    }
    data: dict[str, Any] = {
        "name": "gpu-check",
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        "operator": operator,
        "strategy": "cma_es",
        "evaluators": [evaluator],
        "budget": {"trials": 30},
        "workers": {"gpus": 1, "backend": "inline"},
    }
    return plan_study(resolve(validate(data, "study.yaml"), folder))


def worker_spec(machine: Machine, plan: Plan) -> WorkerSpec:
    """A worker of the study, whose arenas are kept in the folder of the checks."""
    return WorkerSpec(
        template=plan.template,
        evaluators=tuple(evaluator.model_dump(mode="json") for evaluator in plan.spec.evaluators),
        arenas=str(machine.folder / "arenas"),
        threads=machine.threads,
        device=machine.device,
        rows=plan.spec.rows,
    )
