"""Maps of heads that cancel: the function stays, whatever the layout of heads and positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.attention.fitted_maps import Sides, fitted_map
from mergesearch.merging.attention.head_maps import Freedom, block_map, inverse_transposes
from mergesearch.merging.attention.locking import locked_heads
from mergesearch.merging.attention.random_maps import LARGEST, random_maps
from mergesearch.merging.attention.realigning import (
    MappedHeads,
    mappable,
    realigned,
    recovered,
)
from tests.merging.lineage import twins

_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLP = {"intermediate_size": 48}
_GROUPS = {"num_key_value_heads": 2}
_GPTJ = {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4, "vocab_size": 64}
#: Model class -> settings, and which pairs may be mapped.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "bloom, head by head": ("BloomForCausalLM", {"n_head": 4, "n_layer": 1}, 2),
    "cohere, neighbours": ("CohereForCausalLM", _MLP | _GROUPS, 2),
    "falcon, group by group": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        2,
    ),
    "gpt-j, neighbours in part": ("GPTJForCausalLM", _GPTJ, 2),
    "phi-3, fused with groups": ("Phi3ForCausalLM", _MLP | _GROUPS, 2),
    "qwen3, norms of queries": ("Qwen3ForCausalLM", _MLP | _GROUPS | {"head_dim": 8}, 1),
    "t5, relative positions": (
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48},
        2,
    ),
}
TOKENS = torch.arange(3, 27).reshape(2, 12)


def _model(label: str) -> torch.nn.Module:
    import transformers

    name, settings, _ = ARCHITECTURES[label]
    architecture = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = architecture.config_class(**(_TINY | settings))
        model: torch.nn.Module = architecture(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        first: torch.Tensor = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))[0]
    return first


def _apply(heads: MappedHeads, state: twins.State) -> twins.State:
    return {
        name: heads.apply(name, tensor, "float32") if name in heads.names else tensor
        for name, tensor in state.items()
    }


def _distance(state: twins.State, base: twins.State, names: tuple[str, ...]) -> float:
    return max(float((state[n] - base[n]).norm() / base[n].norm()) for n in names)


@pytest.mark.parametrize("label", ARCHITECTURES)
def test_a_lock_leaves_the_answers_of_every_layout(label: str) -> None:
    model = _model(label)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    attentions = mappable(shapes, model.config.to_dict())
    assert [len(free) for _, free in attentions] == [ARCHITECTURES[label][2]]
    before = _answers(model)
    heads = locked_heads(attentions, 3)
    locked = _apply(heads, state)
    assert _distance(locked, state, heads.names) > 0.5
    model.load_state_dict(locked)
    torch.testing.assert_close(_answers(model), before, rtol=1e-4, atol=1e-4 * before.abs().max())


def test_maps_that_ignore_rotary_positions_change_the_answers() -> None:
    """What the freedoms of a pair are for."""
    state = twins.build("llama", 1).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = twins.build("llama", 1).config.to_dict()
    silent = {k: v for k, v in config.items() if not k.startswith("rope")}
    heads = locked_heads(mappable(shapes, silent), 3)
    before = twins.answers("llama", state)
    after = twins.answers("llama", _apply(heads, state))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_re_alignment_brings_a_locked_expert_back(family: str) -> None:
    model = twins.build(family, 1)
    base = model.state_dict()
    tuned = twins.changed(base, twins.fine_tuned)
    attentions = mappable({n: tuple(t.shape) for n, t in base.items()}, model.config.to_dict())
    lock = locked_heads(attentions, 0)
    locked = _apply(lock, tuned)
    heads = realigned(base.__getitem__, locked.__getitem__, attentions)
    again = _apply(heads, locked)
    assert _distance(locked, base, lock.names) > 1
    assert _distance(again, base, lock.names) < 1.01 * _distance(tuned, base, lock.names)
    wanted = twins.answers(family, tuned)
    torch.testing.assert_close(
        twins.answers(family, again), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )
    share = recovered(base.__getitem__, locked.__getitem__, attentions)
    assert 0.9 < share < 1
    assert recovered(base.__getitem__, base.__getitem__, attentions) != share


def test_a_seed_tells_the_maps_and_their_singular_values_are_bounded() -> None:
    freedom = Freedom("query-key", np.array([0, 1]), np.array([2, 3]), np.array([4, 5, 6]))
    maps = random_maps(freedom, 2, 7, np.random.default_rng(5))
    np.testing.assert_array_equal(maps, random_maps(freedom, 2, 7, np.random.default_rng(5)))
    values = np.linalg.svd(maps, compute_uv=False)
    assert values.max() <= LARGEST + 1e-9
    assert values.min() >= 1 / LARGEST - 1e-9
    assert np.all(maps[:, :4, 4:] == 0)
    np.testing.assert_allclose(
        inverse_transposes(maps).transpose(0, 2, 1) @ maps, np.stack([np.eye(7)] * 2), atol=1e-12
    )


def test_the_fit_is_the_best_of_its_neighbours() -> None:
    """No small step from the fitted map is nearer to the base: it is a minimum of equation 1."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((6, 40))
    second = generator.standard_normal((6, 30))
    turn = np.linalg.qr(generator.standard_normal((6, 6)))[0] * 1.7
    noisy = [side + 0.05 * generator.standard_normal(side.shape) for side in (first, second)]
    sides = Sides(first, second, turn @ noisy[0], np.linalg.inv(turn).T @ noisy[1])
    freedom = Freedom("value-output", np.arange(0), np.arange(0), np.arange(6))
    fitted = fitted_map(sides, freedom)
    found = sides.mapped(fitted).distance
    assert found < 0.01 * sides.distance
    for _ in range(20):
        step = np.eye(6) + 0.01 * generator.standard_normal((6, 6))
        assert sides.mapped(step @ fitted).distance > found


def test_heads_that_stand_where_the_base_has_them_stay() -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal((4, 9))
    sides = Sides(base, base, base, base)
    freedom = Freedom("query-key", np.array([0]), np.array([1]), np.array([2, 3]))
    np.testing.assert_array_equal(fitted_map(sides, freedom), np.eye(4))
    turned = block_map(freedom, 4, np.array([[0.0], [1.0]]), np.eye(2))
    np.testing.assert_allclose(turned @ turned, np.diag([-1.0, -1.0, 1.0, 1.0]))
