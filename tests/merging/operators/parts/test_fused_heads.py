"""Fused projections are divided as the attention classes of transformers divide them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergesearch.merging.tensors.fused_heads import fused_layout
from tests.merging.operators.fused_models import MODELS, Fused, State, divided


def _scaled(state: State, model: Fused, config: dict[str, Any], factors: dict[str, float]) -> State:
    """A copy with sides of every attention multiplied by factors; ``o`` is the output."""
    copy = {name: tensor.clone() for name, tensor in state.items()}
    for name in (name for name in state if name.endswith(model.name)):
        parts = divided(name, copy[name], config)
        layout = fused_layout(name, len(copy[name]), config)
        assert layout is not None
        assert layout.sides == model.sides.replace(".", "k")
        for side, part in zip(model.sides, parts, strict=True):
            part.put(part.view(copy[name]) * factors.get(side, 1.0), copy[name])
        where = name.removesuffix(model.name)
        beside = [where + model.output, where.removesuffix("attention.") + model.output]
        copy[next(one for one in beside if one in copy)] *= factors.get("o", 1.0)
    return copy


@pytest.mark.parametrize("which", MODELS)
def test_factors_that_cancel_in_attention_leave_the_model_as_it_was(which: str) -> None:
    """Queries times 2 and keys times 1/2, values times 4 and outputs times 1/4."""
    fused = MODELS[which]
    model = fused.build()
    config = model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(10).reshape(2, 5) + 3

    def answers(**factors: float) -> torch.Tensor:
        model.load_state_dict(_scaled(state, fused, config, factors))
        with torch.no_grad():
            return model(tokens).logits

    plain = answers()
    torch.testing.assert_close(answers(v=4.0, o=0.25), plain, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(answers(v=4.0), plain, rtol=1e-4)
    if "q" in fused.sides:
        torch.testing.assert_close(answers(q=2.0, k=0.5), plain, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(answers(q=2.0), plain, rtol=1e-4)


@pytest.mark.parametrize("which", [name for name, one in MODELS.items() if one.split])
def test_matrices_are_those_that_the_attention_class_splits(which: str) -> None:
    fused = MODELS[which]
    model = fused.build()
    name = next(name for name in model.state_dict() if name.endswith(fused.name))
    attention = model.get_submodule(name.removesuffix(f".{fused.name}"))
    weight = model.state_dict()[name]
    inputs = torch.randn(1, 1, weight.shape[1], dtype=torch.float64)
    theirs = getattr(attention, fused.split)(inputs @ weight.T)
    ours = [part.view(weight) for part in divided(name, weight, model.config.to_dict())]
    assert len(ours) == 3
    for matrix, features in zip(ours, theirs, strict=True):
        heads = features.reshape(-1, attention.head_dim)
        shared = len(heads) * attention.head_dim // len(matrix)  # Falcon repeats keys and values
        expected = heads[::shared].flatten()
        torch.testing.assert_close((inputs @ matrix.T).flatten(), expected, rtol=1e-12, atol=1e-12)


def test_gpt_neox_attends_to_the_matrices_that_operators_see() -> None:
    from transformers import AttentionInterface

    seen: list[Sequence[torch.Tensor]] = []

    def record(module: Any, q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> Any:
        seen.append((q, k, v))
        return torch.zeros_like(q).transpose(1, 2), None

    AttentionInterface.register("mergesearch_record", record)
    model = MODELS["gpt_neox"].build()
    model.config._attn_implementation = "mergesearch_record"
    attention = model.gpt_neox.layers[0].attention
    inputs = torch.randn(1, 1, 24, dtype=torch.float64)
    unturned = (torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    attention(inputs, None, position_embeddings=tuple(one.double() for one in unturned))
    weight = attention.query_key_value.weight.detach()
    parts = divided("gpt_neox.query_key_value.weight", weight, model.config.to_dict())
    for part, heads in zip(parts, seen[0], strict=True):
        expected = (inputs @ part.view(weight).T).flatten()
        torch.testing.assert_close(heads.flatten(), expected, rtol=1e-12, atol=1e-12)


def test_qwen3_next_orders_the_rows_of_its_linear_attention_alike() -> None:
    import transformers
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = transformers.Qwen3NextConfig(
        hidden_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    layer = Qwen3NextGatedDeltaNet(config, 0)
    weight = layer.in_proj_qkvz.weight.detach()
    rows = torch.arange(len(weight)).view(1, 1, -1)
    theirs = layer.fix_query_key_value_ordering(rows, torch.zeros(1, 1, 8))[:4]
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    numbers = rows.view(-1, 1).expand(weight.shape).contiguous()
    parts = divided(name, weight, config.to_dict())
    assert [part.view(numbers)[:, 0].tolist() for part in parts] == [
        one.flatten().tolist() for one in theirs
    ]


#: Models that transformers has no class for, and gates: configuration, name, rows of 24 as they
#: belong to each matrix.
NAMED: list[tuple[dict[str, Any], str, int, list[Sequence[int]]]] = [
    (
        {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
        "model.layers.0.attention.wqkv.weight",
        16,
        [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
    ),
    (
        {
            "model_type": "internvl_chat",
            "llm_config": {
                "model_type": "internlm2",
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "vision_config": {"model_type": "intern_vit_6b", "num_attention_heads": 2},
        },
        "language_model.model.layers.0.attention.wqkv.weight",
        8,
        [[0, 1, 4, 5], [2, 6], [3, 7]],
    ),
    (
        {
            "model_type": "chatglm",
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
        16,
        [range(8), range(8, 12), range(12, 16)],
    ),
    (
        {"model_type": "chatglm", "num_attention_heads": 2},
        "transformer.layers.0.attention.query_key_value.weight",
        12,
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    ),
    (
        {"model_type": "RefinedWeb", "n_head": 4, "n_head_kv": 2},
        "transformer.h.0.self_attention.query_key_value.weight",
        8,
        [[0, 1, 4, 5], [2, 6], [3, 7]],
    ),
    (
        {"model_type": "baichuan", "num_attention_heads": 2},
        "model.layers.0.self_attn.W_pack.weight",
        12,
        [range(4), range(4, 8), range(8, 12)],
    ),
    (
        {"model_type": "qwen", "num_attention_heads": 2},
        "transformer.h.0.attn.c_attn.weight",
        12,
        [range(4), range(4, 8), range(8, 12)],
    ),
    (
        {"model_type": "minimax", "num_attention_heads": 2},
        "model.layers.0.self_attn.qkv_proj.weight",
        12,
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    ),
    (
        {"model_type": "deepseek_v3", "kv_lora_rank": 5, "qk_rope_head_dim": 2},
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        7,
        [range(5), range(5, 7)],
    ),
    (
        {"model_type": "qwen3_next", "num_attention_heads": 2, "head_dim": 2},
        "model.layers.0.self_attn.q_proj.weight",
        8,
        [[0, 1, 4, 5], [2, 3, 6, 7]],
    ),
]


@pytest.mark.parametrize(
    ("config", "name", "rows", "expected"), NAMED, ids=lambda value: str(value)[:24]
)
def test_rows_of_models_that_are_known_by_their_published_code(
    config: dict[str, Any], name: str, rows: int, expected: list[Sequence[int]]
) -> None:
    numbers = torch.arange(rows).view(-1, 1).repeat(1, 4)
    parts = divided(name, numbers, config)
    assert [part.view(numbers)[:, 0].tolist() for part in parts] == [[*own] for own in expected]
    again = torch.full_like(numbers, -1)
    for part in parts:
        part.put(part.view(numbers), again)
    assert torch.equal(again, numbers), "every row belongs to one matrix"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "falcon"},
        {"model_type": "falcon", "num_attention_heads": 4},
        {"model_type": "falcon", "num_attention_heads": 5, "multi_query": True},
        {"model_type": "gpt_neox", "num_attention_heads": 7},
        {"model_type": "gpt_neox", "num_attention_heads": True},
        {"model_type": "someone_elses", "num_attention_heads": 4},
        {  # two towers, one name, two layouts
            "text_config": {"model_type": "gpt_neox", "num_attention_heads": 4},
            "other_config": {"model_type": "chatglm", "num_attention_heads": 2},
        },
    ],
    ids=str,
)
def test_what_a_configuration_does_not_say_stays_one_matrix(config: dict[str, Any]) -> None:
    name = "h.0.self_attention.query_key_value.weight"
    assert fused_layout(name, 24, config) is None
    assert len(divided(name, torch.zeros(24, 8), config)) == 1
