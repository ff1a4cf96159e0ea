"""Routing statistics against a plain loop over what transformers says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.mixture.layers import moe_layers, read_experts
from mergesearch.merging.mixture.statistics import measure_layers
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.loading import load_model


def _batches() -> list[Items]:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        ids = torch.from_numpy(rng.integers(3, 30, (3, 8)))
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        batches.append(Items({"input_ids": ids, "attention_mask": mask}))
    return batches


def test_usage_and_logits_are_those_of_the_tokens_that_count(
    mixture: Callable[[str], Path],
) -> None:
    folder = mixture("mixtral")
    model = load_model(str(folder), "AutoModelForCausalLM")
    layers = moe_layers(open_checkpoint(str(folder)))
    found = measure_layers(model, layers, _batches(), outputs=False)
    for block in range(2):
        counts = np.zeros(5)
        products = np.zeros((5, 5))
        for items in _batches():
            with torch.no_grad():
                logits = model(**items.inputs, output_router_logits=True).router_logits[block]
            kept = logits[items.inputs["attention_mask"].reshape(-1).bool()].double().numpy()
            products += kept.T @ kept
            for row in kept:
                counts[np.argsort(-row)[:2]] += 1
        assert found[block].tokens == 2 * 22
        np.testing.assert_allclose(found[block].usage, counts / counts.sum())
        np.testing.assert_allclose(found[block].logits, products, rtol=1e-6)


def test_outputs_are_those_of_every_expert_on_every_token(mixture: Callable[[str], Path]) -> None:
    folder = mixture("qwen3_moe")
    checkpoint = open_checkpoint(str(folder))
    layers = moe_layers(checkpoint)
    model = load_model(str(folder), "AutoModelForCausalLM")
    seen: list[torch.Tensor] = []
    gate = model.get_submodule("model.layers.0.mlp.gate")
    handle = gate.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    found = measure_layers(model, layers, _batches(), outputs=True)[0]
    handle.remove()
    masks = [items.inputs["attention_mask"].reshape(-1).bool() for items in _batches()]
    hidden = torch.cat([s.reshape(-1, 8)[m] for s, m in zip(seen, masks, strict=True)]).double()
    rows = []
    for expert in read_experts(checkpoint, layers[0]):
        inner = hidden @ expert.gate.double().T
        inner = inner / (1 + (-inner).exp()) * (hidden @ expert.up.double().T)
        rows.append((inner @ expert.down.double().T).reshape(-1).numpy())
    stacked = np.stack(rows)
    np.testing.assert_allclose(found.outputs, stacked @ stacked.T, rtol=1e-4)
