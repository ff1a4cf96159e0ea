"""A model over two cards, each of which merges its own layers, against the same on one card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.gpu_check.check import Figure, Machine, Skipped
from experiments.gpu_check.models import models, planned_study, worker_spec
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.device_map import device_map, device_memory, dispatch
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.tensors.accelerator import device_module

CARDS = 2
MODEL_CLASS = "AutoModelForCausalLM"

#: Largest difference of logits, as a share of the largest logit: bf16 has eight bits.
BAR = 0.01


def run(machine: Machine) -> Sequence[Figure]:
    """Where the model lies, its merged weights, and its logits."""
    if not machine.is_card or device_module(machine.device).device_count() < CARDS:
        raise Skipped("needs two cards")
    base = str(models(machine) / "base")
    plan = planned_study(machine, "task_arithmetic", 2)
    arenas = open_arenas(
        plan.template, Path(worker_spec(machine, plan).arenas), threads=machine.threads
    )
    model = load_model(base, MODEL_CLASS)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    devices = device_map(
        model, device_memory(machine.device, CARDS), needed=1 + arenas.memory.nbytes / weights
    )
    several = MergedModel(model, arenas, devices=devices)
    dispatch(model, devices)
    one = MergedModel(load_model(base, MODEL_CLASS), arenas, device=f"{machine.device}:0")
    field = plan.space.decode(plan.space.start).field
    several.write(field)
    one.write(field)
    return _figures(machine, several, one)


def _figures(machine: Machine, several: MergedModel, one: MergedModel) -> list[Figure]:
    cards = len(several.shards)
    names = [spec.name for shard in several.shards for spec in shard.layout.tensors]
    different = 0
    for shard in several.shards:
        for spec in shard.layout.tensors:
            own = shard.slice_of(spec.name).cpu()
            other = one.shards[0].slice_of(spec.name).cpu()
            different += int((own != other).sum())
    tokens = torch.arange(32)[None, :].to(f"{machine.device}:0")
    with torch.inference_mode():
        expected = one.model(tokens).logits.float().cpu()
        found = several.model(tokens).logits.float().cpu()
    error = float((found - expected).abs().max() / expected.abs().max())
    return [
        Figure("shards of the model", f"on {cards} cards", f"{CARDS}", cards == CARDS),
        Figure(
            f"merged weights of {len(names)} tensors",
            f"{different:,} numbers differ from one card's",
            "0",
            different == 0,
        ),
        Figure("logits", f"{error:.1e} of the largest off", f"{BAR:.0%}", error <= BAR),
    ]
