"""The decompositions that spectral operators share, and how they are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import merge
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.parts import decomposition
from mergesearch.merging.operators.parts import singular as remembering
from mergesearch.merging.operators.parts.decomposition import decompose, numerical_rank
from mergesearch.merging.operators.parts.matrices import matrices_in
from mergesearch.merging.operators.parts.polar import polar
from mergesearch.merging.operators.parts.singular import singular, singular_side_by_side
from mergesearch.merging.tensors.memo import Memo
from tests.merging.operators.parts.families import draw, selection, sources


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


class TestDecompositions:
    @pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
    def test_gives_back_the_matrix(self, shape: tuple[int, int]) -> None:
        matrix = draw(*shape).double()
        svd = decompose(matrix)
        torch.testing.assert_close(svd.left @ torch.diag(svd.values) @ svd.right, matrix)

    def test_a_failure_to_converge_is_met_in_fp64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matrix = draw(5, 3)
        real = torch.linalg.svd

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
        (part,) = matrices_in("w", (rows, columns), selection(shapes))
        deltas = [draw(rows, columns, seed=k) for k in range(3)]
        svd = singular_side_by_side(base, experts, part, deltas)
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
        (part,) = matrices_in("w", (6, 4), selection(shapes))
        delta = expert.read("w") - base.read("w")
        first = singular(base, expert, part, delta, 2)
        assert (first.left.shape, first.values.shape, first.right.shape) == ((6, 2), (2,), (2, 4))

        def refuse(*_arguments: Any, **_options: Any) -> Any:
            raise AssertionError("decomposed again")

        monkeypatch.setattr(remembering, "decompose", refuse)
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
        monkeypatch.setattr(decomposition, "PRECISE_UP_TO", limit)
        torch.testing.assert_close(
            merge(base, experts, operator=operator, **options)["w"], precise, rtol=0, atol=1e-5
        )
