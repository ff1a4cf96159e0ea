"""Measures of layers against plain loops over the same model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.models.blocks import block_chains
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.models.layer_bits import BitLayer, bit_layers
from mergesearch.merging.models.layer_importance import (
    input_modification,
    mean_importance,
    run_through,
    skip_changes,
    z_score_importance,
)
from mergesearch.merging.tensors.layout import Layout
from tests.search.conftest import pico_config


@pytest.fixture
def model() -> Any:
    from transformers import ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ViTForImageClassification(pico_config()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def source_of(model: Any, name: str = "one") -> MappingSource:
    state = model.state_dict()
    return MappingSource(name, state, list(state))


def layers_of(model: Any) -> tuple[BitLayer, ...]:
    state = model.state_dict()
    return bit_layers(Layout.build({n: (tuple(t.shape), "float32") for n, t in state.items()}))


def pixels() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def hidden_states(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(pixel_values=pixels(), output_hidden_states=True)
    return [state.double().reshape(-1, state.shape[-1]) for state in output.hidden_states]


def test_z_scores_by_hand() -> None:
    tensors = {"a": torch.tensor([[0.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([[1.0, 2.0]])}
    source = MappingSource("one", tensors, ["a", "b"])
    flat = np.array([0, 0, 0, 4, 1, 2.0])
    share = np.mean((flat - flat.mean()) / flat.std() > 1)
    received = z_score_importance(source, [BitLayer("block 0", ("a", "b"), 6)])
    assert received == pytest.approx([-share])
    constant = MappingSource("one", {"a": torch.ones(2, 2)}, ["a"])
    assert z_score_importance(constant, [BitLayer("block 0", ("a",), 4)]).tolist() == [0.0]


def test_input_modification_is_minus_the_cosine_of_hidden_states(model: Any) -> None:
    states = hidden_states(model)
    expected = [
        -float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())
        for before, after in pairwise(states)
    ]
    calibration = Calibration(
        model, [{"pixel_values": pixels()[:2]}, {"pixel_values": pixels()[2:]}]
    )
    source = source_of(model)
    runner = ExpertRunner(calibration, source, [source])
    received = input_modification(runner, source, layers_of(model))
    assert received == pytest.approx(expected, abs=1e-6)
    assert len(set(received)) == 2


def test_without_items_the_mean_of_z_scores_is_measured(model: Any) -> None:
    layers = layers_of(model)
    source = source_of(model)
    halved = {name: tensor.abs() for name, tensor in model.state_dict().items()}
    other = MappingSource("two", halved, list(halved))
    received = mean_importance(source, [source, other], layers, None)
    each = [z_score_importance(one, layers) for one in (source, other)]
    assert received == pytest.approx(np.mean(each, axis=0))
    assert not np.allclose(*each)


def test_contributions_and_skips_are_those_of_a_plain_loop(model: Any) -> None:
    (chain,) = block_chains(model)
    states = hidden_states(model)
    passed = run_through(model, chain.blocks, lambda: model(pixel_values=pixels()))
    for index, each in enumerate(passed):
        before = states[index]
        added = (states[index + 1] - before).norm(dim=-1) / before.norm(dim=-1)
        assert each.relative / each.count == pytest.approx(float(added.mean()), rel=1e-5)

    def answer() -> torch.Tensor:
        logits: torch.Tensor = model(pixel_values=pixels()).logits
        return logits

    received = skip_changes(model, chain, answer)
    whole = answer().double()
    blocks = model.get_submodule(chain.name)
    for index in range(len(blocks)):
        kept = blocks[index]
        blocks[index] = _Nothing()
        changed = (answer().double() - whole).norm() / whole.norm()
        blocks[index] = kept
        assert received[index] == pytest.approx(float(changed.detach()), rel=1e-6)


class _Nothing(torch.nn.Module):
    """A block that hands on what it is given."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states
