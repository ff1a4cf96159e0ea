"""An operator on a stack of matrices is the operator on each of them, stacked again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mergesearch.merging import merge
from mergesearch.merging.operators import OPERATORS, get_operator
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.stacks import stack_layouts

EXPERTS = 3
HIDDEN = 10
INNER = 6
HEADS = 5

State = dict[str, torch.Tensor]
#: Operators that follow a formula on each matrix, or on its columns.
BY_MATRIX = [
    name for name, operator in OPERATORS.items() if operator.family in ("spectral", "column")
]


def _stack(layout: str, gate: list[State], where: str) -> State:
    """Gate, up and down matrices of each expert as an architecture stores them."""
    downs = [one["down"] for one in gate]
    if layout == "gpt-oss":  # (in, out), gate and up in turns, biases
        fused = [torch.stack((one["gate"], one["up"]), 1).flatten(0, 1).T for one in gate]
        return {
            f"{where}.gate_up_proj": torch.stack(fused),
            f"{where}.gate_up_proj_bias": torch.stack([one["bias"] for one in gate]),
            f"{where}.down_proj": torch.stack([down.T for down in downs]),
        }
    fused = [torch.cat((one["gate"], one["up"])) for one in gate]
    if layout == "llama4":  # (in, out), gate before up
        return {
            f"{where}.gate_up_proj": torch.stack([one.T for one in fused]),
            f"{where}.down_proj": torch.stack([down.T for down in downs]),
        }
    return {  # Qwen3-MoE, Mixtral: (out, in), gate before up
        f"{where}.gate_up_proj": torch.stack(fused),
        f"{where}.down_proj": torch.stack(downs),
    }


def _experts_of(generator: torch.Generator) -> list[State]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        {
            "gate": draw(INNER, HIDDEN),
            "up": draw(INNER, HIDDEN),
            "down": draw(HIDDEN, INNER),
            "bias": draw(2 * INNER),
        }
        for _ in range(EXPERTS)
    ]


def _models() -> list[list[State]]:
    """Base and three experts, each as the matrices of its mixture."""
    generator = torch.Generator().manual_seed(0)
    base = _experts_of(generator)
    changed = [_experts_of(generator) for _ in range(3)]
    return [
        base,
        *(
            [{n: t + 0.1 * c[n] for n, t in b.items()} for b, c in zip(base, change, strict=True)]
            for change in changed
        ),
    ]


def _apart(model: list[State], layout: str) -> State:
    """Every matrix a tensor of its own, as `nn.Linear` stores it."""
    words = ("gate", "up", "down", "bias") if layout == "gpt-oss" else ("gate", "up", "down")
    return {
        f"model.layers.0.mlp.{number}.{word}_proj.{'bias' if word == 'bias' else 'weight'}": one[
            word
        ]
        for number, one in enumerate(model)
        for word in words
    }


def _merged(operator: str, models: list[State], **options: Any) -> State:
    order = {"order": ["e0", "e1", "e2"]} if operator in ("dop", "opcm") else {}
    most = OPERATORS[operator].experts[1] or len(models)
    experts = {f"e{i}": state for i, state in enumerate(models[1 : 1 + most])}
    return merge(models[0], experts, operator=operator, **order, **options)


@pytest.mark.parametrize("layout", ["gpt-oss", "llama4", "qwen3"])
@pytest.mark.parametrize("operator", BY_MATRIX)
def test_a_stack_is_a_batch_of_matrices(operator: str, layout: str) -> None:
    where = "model.layers.0.mlp.experts"
    models = _models()
    merged = _merged(operator, [_stack(layout, model, where) for model in models])
    apart = _merged(operator, [_apart(model, layout) for model in models])
    again = [
        {
            word: apart[
                f"model.layers.0.mlp.{number}.{word}_proj.{'bias' if word == 'bias' else 'weight'}"
            ]
            for word in models[0][0]
            if word != "bias" or layout == "gpt-oss"
        }
        for number in range(EXPERTS)
    ]
    expected = _stack(layout, again, where)
    base = _stack(layout, models[0], where)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        if not name.endswith("bias"):
            assert not torch.equal(tensor, base[name]), "nothing stays the base's"


def _fused(kind: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Matrices as an architecture fuses them."""
    if kind == "by head":
        heads = [part.unflatten(0, (HEADS, -1)) for part in parts]
        return torch.stack(heads, 1).flatten(0, 2)
    return torch.cat(parts)


@pytest.mark.parametrize("operator", ["tsv", "iso_c", "wudi", "optmerge", "widen"])
@pytest.mark.parametrize(
    ("kind", "name", "rows", "beside"),
    [
        ("gate and up", "model.layers.0.mlp.gate_up_proj.weight", (6, 6), "mlp.down_proj"),
        ("grouped", "model.layers.0.self_attn.qkv_proj.weight", (12, 4, 4), "self_attn.o_proj"),
        ("by head", "gpt_neox.layers.0.attention.query_key_value.weight", (20, 20, 20), ""),
    ],
)
def test_a_fused_matrix_is_the_matrices_that_it_holds(
    operator: str, kind: str, name: str, rows: tuple[int, ...], beside: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    back = f"model.layers.0.{beside}.weight"
    models = [[torch.randn(count, HIDDEN, generator=generator) for count in rows]]
    models += [
        [part + 0.1 * torch.randn(part.shape, generator=generator) for part in models[0]]
        for _ in range(3)
    ]
    output = torch.randn(HIDDEN, rows[0], generator=generator)
    extra = {back: output} if beside else {}
    sources = [
        Configured({name: _fused(kind, parts)} | extra, "gpt_neox" if kind == "by head" else "x")
        for parts in models
    ]
    layout = Layout.build({n: (tuple(t.shape), "float32") for n, t in sources[0].tensors.items()})
    chosen = get_operator(operator)
    options = chosen.check(layout, 3, {})
    basis = chosen.prepare(sources[0], sources[1:], **options)
    apart = [
        Configured({f"model.layers.0.{i}.weight": part for i, part in enumerate(parts)}, "x")
        for parts in models
    ]
    alone = chosen.prepare(apart[0], apart[1:], **options)
    pieces = [alone.rows(f"model.layers.0.{i}.weight") for i in range(len(rows))]
    for direction, row in enumerate(basis.rows(name)):
        expected = _fused(kind, [piece[direction] for piece in pieces])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Configured:
    """Tensors with a configuration, as a checkpoint has."""

    tensors: State
    model_type: str
    name: str = "e"
    memo: None = None
    identity: str = ""

    @property
    def names(self) -> list[str]:
        return [*self.tensors]

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": self.model_type, "num_attention_heads": HEADS}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def test_layouts_of_stacks_follow_from_names_and_shapes() -> None:
    shapes = {
        "a.experts.gate_up_proj": (4, 16, 24),
        "a.experts.down_proj": (4, 12, 16),
        "square.experts.gate_up_proj": (4, 24, 12),
        "square.experts.down_proj": (4, 12, 12),
        "b.experts.w1": (3, 5, 6),
        "moe.block_sparse_moe.input_linear.weight": (4, 24, 16),
        "moe.block_sparse_moe.output_linear.weight": (4, 16, 12),
        "conv.weight": (8, 4, 3),
        "pos_embed": (1, 5, 6),
        "c.mlp.gate_up_proj.weight": (25, 16),
        "c.mlp.down_proj.weight": (16, 12),
        "empty.experts.w1": (0, 5, 6),
        "glm.mlp.dense_h_to_4h.weight": (24, 16),
        "glm.mlp.dense_4h_to_h.weight": (16, 12),
        "neox.mlp.dense_h_to_4h.weight": (24, 16),
        "neox.mlp.dense_4h_to_h.weight": (16, 24),
        "hiera.blocks.2.attn.qkv.weight": (72, 16),
        "hiera.blocks.2.attn.proj.weight": (24, 24),
        "vit.blocks.2.attn.qkv.weight": (48, 16),
        "vit.blocks.2.attn.proj.weight": (16, 16),
        "attn_pool.kv.weight": (16, 8),
        "attn_pool.q.weight": (8, 8),
        "alone.kv.weight": (16, 8),
        "single_blocks.0.linear1.weight": (112, 16),
        "single_blocks.0.linear2.weight": (16, 80),
        "single_blocks.1.linear1.weight": (112, 16),
        "single_blocks.1.linear2.weight": (16, 48),
    }
    layouts = stack_layouts(shapes)
    found = {n: (one.shape, one.transposed, len(one.parts)) for n, one in layouts.items()}
    assert found == {
        "a.experts.gate_up_proj": ((24, 16), True, 2),
        "a.experts.down_proj": ((16, 12), True, 1),
        "square.experts.gate_up_proj": ((24, 12), False, 2),
        "square.experts.down_proj": ((12, 12), False, 1),
        "b.experts.w1": ((5, 6), False, 1),
        "moe.block_sparse_moe.input_linear.weight": ((24, 16), False, 2),
        "moe.block_sparse_moe.output_linear.weight": ((16, 12), False, 1),
        "glm.mlp.dense_h_to_4h.weight": ((24, 16), False, 2),
        "hiera.blocks.2.attn.qkv.weight": ((72, 16), False, 3),
        "attn_pool.kv.weight": ((16, 8), False, 2),
        "single_blocks.0.linear1.weight": ((112, 16), False, 4),
    }
    assert [
        (rows.start, rows.count) for rows in layouts["single_blocks.0.linear1.weight"].parts
    ] == [
        (0, 16),
        (16, 16),
        (32, 16),
        (48, 64),
    ]


def test_della_ranks_the_rows_of_each_matrix() -> None:
    from mergesearch.merging.operators.della import keep_probabilities, sampled

    generator = torch.Generator().manual_seed(0)
    names = {"l.experts.w1": (4, 6, 9)}
    base, expert = (
        Configured({n: torch.randn(s, generator=generator) for n, s in names.items()}, "x")
        for _ in "ab"
    )
    delta = expert.tensors["l.experts.w1"] - base.tensors["l.experts.w1"]
    kept = sampled(base, [expert], 0.7, 0.2)("l.experts.w1")[0] / delta
    expected = torch.stack([1 / keep_probabilities(one, 0.7, 0.2) for one in delta])
    torch.testing.assert_close(kept[kept != 0], expected[kept != 0].float(), rtol=1e-3, atol=1e-3)
