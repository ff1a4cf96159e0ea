"""Which tensors are matrices, and the decompositions that spectral operators share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import CheckpointError, Layout, merge
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.parts import singular as spectral
from mergesearch.merging.operators.parts.singular import (
    Selection,
    decompose,
    numerical_rank,
    parts,
    polar,
    rows_by_matrix,
    singular,
)
from mergesearch.merging.tensors.memo import Memo

GPT2 = {
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.mlp.c_fc.weight": (4, 16),
}
QWEN = {"h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_proj.weight": (4, 4)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def selection(shapes: dict[str, tuple[int, ...]], **options: Any) -> Selection:
    return Selection.of(shapes, **options)


def sources(
    shapes: dict[str, tuple[int, ...]], experts: int
) -> tuple[MappingSource, list[MappingSource]]:
    states = [
        {name: draw(*shape, seed=7 * k) for name, shape in shapes.items()}
        for k in range(experts + 1)
    ]
    base, *others = [MappingSource(str(k), state, list(shapes)) for k, state in enumerate(states)]
    return base, others


@dataclass(frozen=True)
class Stored:
    """A source with an identity, whose results are remembered."""

    tensors: dict[str, torch.Tensor]
    memo: Memo
    identity: str
    name: str = "stored"

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


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
        assert [part.shape for part in parts(name, shape, selection({name: shape}))] == expected

    def test_convolutions_are_reshaped_on_request(self) -> None:
        shapes = {"patch.weight": (8, 3, 2, 2), "depthwise.weight": (8, 1, 1, 1)}
        chosen = selection(shapes, conv="reshape")
        assert [part.shape for part in parts("patch.weight", (8, 3, 2, 2), chosen)] == [(8, 12)]
        assert parts("depthwise.weight", (8, 1, 1, 1), chosen) == ()

    def test_fused_weights_stay_whole_on_request(self) -> None:
        chosen = selection(GPT2, fused="whole")
        assert [part.shape for part in parts("h.0.attn.c_attn.weight", (4, 12), chosen)] == [
            (12, 4)
        ]

    def test_weights_of_gpt2_are_seen_as_out_by_in(self) -> None:
        gpt2, qwen = selection(GPT2), selection(QWEN)
        assert [
            part.transposed for name, shape in GPT2.items() for part in parts(name, shape, gpt2)
        ] == [True] * 5
        assert [
            part.transposed for name, shape in QWEN.items() for part in parts(name, shape, qwen)
        ] == [False] * 2

    def test_blocks_leave_out_what_is_in_no_block(self) -> None:
        shapes = {
            "embed_tokens.weight": (9, 4),
            "layers.0.mlp.up_proj.weight": (8, 4),
            "connector.weight": (4, 4),
        }
        chosen = selection(shapes, matrices="blocks")
        assert [name for name, shape in shapes.items() if parts(name, shape, chosen)] == [
            "layers.0.mlp.up_proj.weight"
        ]

    def test_blocks_of_a_model_without_blocks_are_all_but_embeddings_and_heads(self) -> None:
        shapes = {"wte.weight": (9, 4), "lm_head.weight": (9, 4), "hidden.weight": (4, 4)}
        chosen = selection(shapes, matrices="blocks")
        assert [name for name, shape in shapes.items() if parts(name, shape, chosen)] == [
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
        apart = rows_by_matrix(base, experts, chosen, lambda _part, found: found)("h.0.ln_1.weight")
        one = rows_by_matrix(base, experts, chosen, lambda _part, found: found[:1], fused=True)(
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
        base, expert = draw(6, 4).T, draw(6, 4, seed=1).T
        merged = merge({"w": base}, [{"w": expert}], operator="tsv")["w"]
        torch.testing.assert_close(merged, expert)


class TestDecompositions:
    @pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
    def test_gives_back_the_matrix(self, shape: tuple[int, int]) -> None:
        matrix = draw(*shape).double()
        svd = decompose(matrix)
        torch.testing.assert_close(svd.left @ torch.diag(svd.values) @ svd.right, matrix)

    def test_a_failure_to_converge_is_met_in_fp64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matrix, real = draw(5, 3), torch.linalg.svd

        def fails(given: torch.Tensor, **options: bool) -> Any:
            if given.dtype == torch.float32:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return real(given, **options)

        monkeypatch.setattr(torch.linalg, "svd", fails)
        svd = decompose(matrix)
        assert {svd.left.dtype, svd.values.dtype, svd.right.dtype} == {torch.float32}
        assert (svd.left.shape, svd.right.shape) == ((5, 3), (3, 3))
        torch.testing.assert_close(svd.left @ torch.diag(svd.values) @ svd.right, matrix)

    @pytest.mark.parametrize(("rows", "columns"), [(4, 3), (9, 3), (3, 5)])
    def test_side_by_side_has_the_left_vectors_of_the_joined_matrix(
        self, rows: int, columns: int
    ) -> None:
        shapes = {"w": (rows, columns)}
        base, experts = sources(shapes, 3)
        (part,) = parts("w", (rows, columns), selection(shapes))
        deltas = [draw(rows, columns, seed=k) for k in range(3)]
        svd = spectral.singular_side_by_side(base, experts, part, deltas)
        u, s, _ = np.linalg.svd(torch.cat(deltas, 1).double().numpy(), full_matrices=False)
        np.testing.assert_allclose(svd.values, s[: len(svd.values)], atol=1e-12)
        kept = len(svd.values)
        np.testing.assert_allclose(svd.left @ svd.left.T, u[:, :kept] @ u[:, :kept].T, atol=1e-12)

    def test_singular_vectors_are_remembered_by_expert_part_and_rank(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = {"w": (6, 4)}
        base, expert = (
            Stored({"w": draw(6, 4, seed=k)}, Memo(tmp_path), f"weights {k}") for k in range(2)
        )
        (part,) = parts("w", (6, 4), selection(shapes))
        delta = expert.read("w") - base.read("w")
        first = singular(base, expert, part, delta, 2)
        assert (first.left.shape, first.values.shape, first.right.shape) == ((6, 2), (2,), (2, 4))

        def refuse(_matrix: torch.Tensor) -> Any:
            raise AssertionError("decomposed again")

        monkeypatch.setattr(spectral, "decompose", refuse)
        again = singular(base, expert, part, delta, 2)
        assert torch.equal(first.left, again.left)
        assert torch.equal(first.right, again.right)
        with pytest.raises(AssertionError, match="decomposed again"):
            singular(base, expert, part, delta, 3)

    @pytest.mark.parametrize("operator", ["tsv", "iso_c", "iso_cts", "knots"])
    def test_rows_have_the_same_bits_with_and_without_a_memo(
        self, operator: str, tmp_path: Path
    ) -> None:
        states = [{"w": draw(40, 30, seed=k)} for k in range(4)]
        results = []
        for folder in (tmp_path / "a", tmp_path / "a", None):  # made, read again, not kept
            identity = "weights" if folder else ""
            memo = Memo(folder or tmp_path)
            base, *experts = [
                Stored(state, memo, identity and f"{identity} {k}")
                for k, state in enumerate(states)
            ]
            results.append(OPERATORS[operator].prepare(base, experts).rows("w"))
        assert len(list((tmp_path / "a").iterdir())) == (3 if operator == "tsv" else 1)
        for made, read, plain in zip(*results, strict=True):
            assert torch.equal(made, read)
            assert torch.equal(made, plain)

    def test_numerical_rank(self) -> None:
        def rank(matrix: torch.Tensor, **options: Any) -> int:
            return numerical_rank(
                decompose(matrix.double()).values, matrix.shape, matrix.dtype, **options
            )

        low = draw(9, 2) @ draw(2, 7, seed=1)
        assert rank(low) == 2
        assert rank(low.double()) == 7  # rounded to fp32, which fp64 can tell
        assert rank(torch.zeros(3, 4)) == 0
        assert rank(torch.diag(torch.tensor([1.0, 0.1, 0.01])), floor=0.05) == 2
        assert rank(torch.eye(3), largest=1e9) == 0

    def test_polar_factor_of_full_rank_is_the_nearest_orthonormal_matrix(self) -> None:
        matrix = draw(7, 3).double()
        factor = polar(matrix, torch.float64)
        torch.testing.assert_close(factor.T @ factor, torch.eye(3).double())
        symmetric = factor.T @ matrix  # polar decomposition: matrix = factor · (positive symmetric)
        torch.testing.assert_close(symmetric, symmetric.T)
        assert bool((torch.linalg.eigvalsh(symmetric) > 0).all())
        torch.testing.assert_close(polar(factor, torch.float64), factor)

    def test_polar_factor_shares_a_direction_among_equal_columns(self) -> None:
        column = torch.nn.functional.normalize(draw(5, 1).double(), dim=0)
        torch.testing.assert_close(
            polar(column.repeat(1, 4), torch.float64), column.repeat(1, 4) / 2
        )

    def test_polar_factor_of_nothing(self) -> None:
        assert polar(torch.zeros(4, 0), torch.float32).shape == (4, 0)

    @pytest.mark.parametrize(
        "limit", [0, 40]
    )  # 40: whole matrices in fp32, what is made of some of their columns not
    @pytest.mark.parametrize(
        ("operator", "options"),
        [("tsv", {}), ("tsv", {"rank": "full"}), ("iso_c", {}), ("iso_cts", {}), ("knots", {})],
    )
    def test_large_matrices_are_merged_in_fp32(
        self, operator: str, options: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = {"w": draw(8, 6)}
        experts = [{"w": base["w"] + 0.1 * draw(8, 6, seed=k)} for k in range(1, 4)]
        precise = merge(base, experts, operator=operator, **options)["w"]
        monkeypatch.setattr(spectral, "PRECISE_UP_TO", limit)
        torch.testing.assert_close(
            merge(base, experts, operator=operator, **options)["w"], precise, rtol=0, atol=1e-5
        )


def test_refusals_name_the_first_matrix_that_is_objected_to() -> None:
    layout = Layout.build(
        {"b": ((9,), "float32"), "layers.0.w": ((4, 2), "float32"), "head.w": ((3, 4), "float32")}
    )

    def objection(shape: tuple[int, int]) -> str | None:
        return None if shape[0] == 4 else f"no {shape}"

    assert (
        spectral.spectral_refuse(layout, {"matrices": "all"}, objection)
        == "tensor 'head.w': no (3, 4)"
    )
    assert spectral.spectral_refuse(layout, {"matrices": "blocks"}, objection) is None
