"""What an operator passes over is named, with its share of the parameters."""

from __future__ import annotations

import pytest
import torch

from mergesearch.merging import merge
from mergesearch.merging.family.messages import kind_of
from mergesearch.merging.family.untouched import untouched
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.tensors.layout import Layout

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (12, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 6, 8),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 8),
    "model.layers.0.mlp.experts.down_proj": (3, 4, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.input_layernorm.weight": (6,),
}
LAYOUT = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})


def test_a_stack_of_experts_is_merged_and_the_rest_is_named() -> None:
    left = untouched(OPERATORS["optmerge"], LAYOUT, {})
    assert [(one.kind, one.tensors, one.parameters) for one in left.kinds] == [
        ("model.embed_tokens.weight", 1, 72),
        ("model.layers.#.mlp.experts.gate_up_proj_bias", 1, 24),
        ("model.layers.#.input_layernorm.weight", 2, 12),
    ]
    assert left.share == pytest.approx(108 / 396)
    assert left.sentence.startswith(
        "27% of the parameters stay the base's: model.embed_tokens.weight (72 in 1), "
    )
    averaged = untouched(OPERATORS["optmerge"], LAYOUT, {"others": "mean"})
    assert averaged.kinds == left.kinds
    assert averaged.sentence.startswith("27% of the parameters are merged by the plain mean ")


def test_what_is_averaged_is_said_where_it_is_a_notable_share() -> None:
    left = untouched(OPERATORS["regmean"], LAYOUT, {})
    assert [one.kind for one in left.kinds] == [
        "model.layers.#.mlp.experts.gate_up_proj_bias",
        "model.layers.#.input_layernorm.weight",
    ]
    assert "plain mean" in left.sentence
    norms = Layout.build({"a.weight": ((60, 40), "float32"), "b.weight": ((6,), "float32")})
    assert untouched(OPERATORS["tsv"], norms, {}).sentence == "", "a share that is not worth it"


MERGERS = [name for name, one in OPERATORS.items() if one.family in ("spectral", "column")]


@pytest.mark.parametrize("operator", [*MERGERS, "task_arithmetic", "ties"])
def test_it_says_what_a_merge_of_other_experts_leaves(operator: str) -> None:
    """Nothing that is named moves, and all that stays is named."""
    generator = torch.Generator().manual_seed(0)
    base, one, two = (
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in "abc"
    )
    options = {"order": ["one", "two"]} if operator in ("dop", "opcm") else {}
    merged = merge(base, {"one": one, "two": two}, operator=operator, **options)
    left = untouched(OPERATORS[operator], LAYOUT, options)
    same = {kind_of(name) for name in SHAPES if torch.equal(merged[name], base[name])}
    assert same == ({one.kind for one in left.kinds} if left.fate == "base" else set())
