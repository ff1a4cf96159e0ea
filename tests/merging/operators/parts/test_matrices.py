"""Which tensors are matrices, and rows that follow a formula on each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mergesearch.merging import CheckpointError, Layout, merge
from mergesearch.merging.operators.parts.matrices import (
    matrices_in,
    rows_by_matrix,
    spectral_refuse,
)
from tests.merging.operators.parts.families import draw, selection, sources

GPT2 = {
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.mlp.c_fc.weight": (4, 16),
}
QWEN = {"h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_proj.weight": (4, 4)}


class TestParts:
    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("layers.0.mlp.fc1.weight", (8, 4), [(8, 4)]),
            ("blocks.0.attn.qkv.weight", (12, 4), [(4, 4)] * 3),
            ("resblocks.0.attn.in_proj_weight", (12, 4), [(4, 4)] * 3),
            ("layers.0.self_attn.qkv_proj.weight", (12, 4), [(4, 4)] * 3),  # Phi-3
            ("layers.0.self_attn.qkv_proj.weight", (6, 4), [(6, 4)]),  # grouped queries
            ("h.0.attn.qkv_proj.weight", (12, 4), [(12, 4)]),  # CodeGen goes by head
            ("layers.0.attention.query_key_value.weight", (12, 4), [(12, 4)]),  # so does GPT-NeoX
            ("layers.0.mixer.in_proj.weight", (12, 4), [(12, 4)]),  # no attention
            ("h.0.attn.c_attn.weight", (12, 4), [(12, 4)]),  # Qwen or GPT-BigCode, nobody knows
            ("h.0.attn.c_attn.weight", (4, 12), [(4, 4)] * 3),  # GPT-2
            ("h.0.crossattention.c_attn.weight", (4, 8), [(8, 4)]),  # GPT-2: key and value
            ("patch.weight", (8, 3, 2, 2), []),
            ("column", (9, 1), []),
            ("row", (1, 9), []),
            ("empty", (4, 0), []),
            ("bias", (7,), []),
            ("scale", (), []),
            ("tokens", (1, 5, 8), []),
        ],
    )
    def test_matrices_inside_a_tensor(
        self, name: str, shape: tuple[int, ...], expected: list[tuple[int, int]]
    ) -> None:
        assert [
            part.shape for part in matrices_in(name, shape, selection({name: shape}))
        ] == expected

    def test_convolutions_are_reshaped_on_request(self) -> None:
        shapes = {"patch.weight": (8, 3, 2, 2), "depthwise.weight": (8, 1, 1, 1)}
        chosen = selection(shapes, conv="reshape")
        assert [part.shape for part in matrices_in("patch.weight", (8, 3, 2, 2), chosen)] == [
            (8, 12)
        ]
        assert matrices_in("depthwise.weight", (8, 1, 1, 1), chosen) == ()

    def test_fused_weights_stay_whole_on_request(self) -> None:
        chosen = selection(GPT2, fused="whole")
        assert [part.shape for part in matrices_in("h.0.attn.c_attn.weight", (4, 12), chosen)] == [
            (12, 4)
        ]

    def test_weights_of_gpt2_are_seen_as_out_by_in(self) -> None:
        gpt2 = selection(GPT2)
        qwen = selection(QWEN)
        assert [
            part.transposed
            for name, shape in GPT2.items()
            for part in matrices_in(name, shape, gpt2)
        ] == [True] * 5
        assert [
            part.transposed
            for name, shape in QWEN.items()
            for part in matrices_in(name, shape, qwen)
        ] == [False] * 2

    def test_blocks_leave_out_what_is_in_no_block(self) -> None:
        shapes = {
            "embed_tokens.weight": (9, 4),
            "layers.0.mlp.up_proj.weight": (8, 4),
            "connector.weight": (4, 4),
        }
        chosen = selection(shapes, matrices="blocks")
        assert [name for name, shape in shapes.items() if matrices_in(name, shape, chosen)] == [
            "layers.0.mlp.up_proj.weight"
        ]

    def test_blocks_of_a_model_without_blocks_are_all_but_embeddings_and_heads(self) -> None:
        shapes = {"wte.weight": (9, 4), "lm_head.weight": (9, 4), "hidden.weight": (4, 4)}
        chosen = selection(shapes, matrices="blocks")
        assert [name for name, shape in shapes.items() if matrices_in(name, shape, chosen)] == [
            "hidden.weight"
        ]


class TestRows:
    SHAPES = GPT2 | {
        "h.0.conv.weight": (4, 3, 2, 2),
        "h.0.ln_1.weight": (5,),
        "scale": (),
        "empty": (0, 4),
    }

    @pytest.mark.parametrize("conv", ["others", "reshape"])
    @pytest.mark.parametrize("fused", ["split", "whole"])
    def test_parts_are_put_back_where_they_were(self, conv: str, fused: str) -> None:
        base, experts = sources(self.SHAPES, 2)
        chosen = selection(self.SHAPES, conv=conv, fused=fused, others="sum")
        rows = rows_by_matrix(base, experts, chosen, lambda _part, deltas: deltas)
        for name in self.SHAPES:
            expected = [expert.read(name) - base.read(name) for expert in experts]
            assert all(
                torch.equal(row, delta) for row, delta in zip(rows(name), expected, strict=True)
            )

    def test_the_formula_sees_every_third_by_itself_as_out_by_in(self) -> None:
        base, experts = sources(GPT2, 1)
        rows = rows_by_matrix(
            base, experts, selection(GPT2), lambda part, deltas: [deltas[0] * (1 + part.start)]
        )
        delta = experts[0].read("h.0.attn.c_attn.weight") - base.read("h.0.attn.c_attn.weight")
        scale = torch.tensor(
            [1.0] * 4 + [5.0] * 4 + [9.0] * 4
        )  # columns: outputs of GPT-2's layers
        assert torch.equal(rows("h.0.attn.c_attn.weight")[0], delta * scale)

    @pytest.mark.parametrize(("others", "share"), [("mean", 0.5), ("sum", 1.0), ("base", 0.0)])
    def test_what_other_tensors_become(self, others: Any, share: float) -> None:
        base, experts = sources(self.SHAPES, 2)
        chosen = replace(selection(self.SHAPES), others=others)
        deltas = [
            expert.read("h.0.ln_1.weight") - base.read("h.0.ln_1.weight") for expert in experts
        ]
        apart = rows_by_matrix(base, experts, chosen, lambda _part, given: given)("h.0.ln_1.weight")
        one = rows_by_matrix(base, experts, chosen, lambda _part, given: given[:1], one_row=True)(
            "h.0.ln_1.weight"
        )
        for row, delta in zip(apart, deltas, strict=True):
            torch.testing.assert_close(row, share * delta)
        torch.testing.assert_close(one, [share * (deltas[0] + deltas[1])])

    def test_a_task_vector_that_is_not_finite_is_refused_by_name(self) -> None:
        base = {"w": torch.zeros(3, 3)}
        with pytest.raises(
            CheckpointError, match="expert 'bad': tensor 'w': expected finite numbers"
        ):
            merge(base, {"bad": {"w": torch.full((3, 3), torch.nan)}}, operator="iso_c")

    def test_transposed_views_as_input(self) -> None:
        base = draw(6, 4).T
        expert = draw(6, 4, seed=1).T
        merged = merge({"w": base}, [{"w": expert}], operator="tsv")["w"]
        torch.testing.assert_close(merged, expert)


def test_refusals_name_the_first_matrix_that_is_objected_to() -> None:
    layout = Layout.build(
        {"b": ((9,), "float32"), "layers.0.w": ((4, 2), "float32"), "head.w": ((3, 4), "float32")}
    )

    def objection(shape: tuple[int, int]) -> str | None:
        return None if shape[0] == 4 else f"no {shape}"

    assert spectral_refuse(layout, {"matrices": "all"}, objection) == "tensor 'head.w': no (3, 4)"
    assert spectral_refuse(layout, {"matrices": "blocks"}, objection) is None
