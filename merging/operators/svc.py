"""SVC: singular values of a merge, scaled down where experts share a direction.

Li 2026, "When shared knowledge hurts: spectral over-accumulation in model merging". Another method
merges; with its matrix ΔW = U Σ Vᵀ and the task vectors τ_i, for every left singular vector u_r:

* a_r = u_rᵀ ΔW and a_r^i = u_rᵀ τ_i, the responses of the merge and of expert i.
* s_r^i = ⟨a_r, a_r^i⟩ / ‖a_r^i‖², above 1 where the merge exaggerates what expert i does.
* γ_r = K / Σ_i max(α, s_r^i), and σ_r becomes γ_r σ_r; α = 1/K unless given.

α = 1 only takes away; a smaller one also raises directions that the merge neglects. The calibrated
matrix is P ΔW with P = U diag(γ) Uᵀ, a linear map, so that each term of the merge keeps a direction
and a coefficient of its own; 1 reproduces the paper. γ is that of the merge at the method's default
coefficient, or at ``scale``.

The authors' code takes the mean of the s_r^i where all are positive and leaves σ_r alone elsewhere,
which is not the formula of the paper; here the formula holds. Directions of numerically zero
singular values are arbitrary and stay as they are. Experts without a response, for which s is not
defined, are not counted, and K counts the experts that changed the matrix. Tensors that are no
matrices stay as the method merged them. Isotropic merging, which the paper calibrates, too, is not
among the methods: its singular values are all equal, so that their directions are arbitrary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import (
    Svd,
    decompose,
    numerical_rank,
    precise,
    precise_sum,
)
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Selection,
    matrices_in,
)
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.operators.task_arithmetic import TASK_ARITHMETIC
from mergesearch.merging.operators.ties import TIES
from mergesearch.merging.operators.tsv import TSV
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Methods whose merge can be calibrated, each at its default hyperparameters.
METHODS: Mapping[str, Operator] = {method.name: method for method in (TASK_ARITHMETIC, TIES, TSV)}


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    method: Annotated[
        Literal["task_arithmetic", "ties", "tsv"],
        Field(description="whose merge is calibrated, with its default hyperparameters"),
    ] = "task_arithmetic",
    scale: Annotated[
        float | None,
        Field(gt=0, description="coefficient of that merge; none: the method's default"),
    ] = None,
    alpha: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="least exaggeration that is counted: 1 only lowers singular values; none: "
            "one over the number of experts",
        ),
    ] = None,
    matrices: Matrices = "all",
    conv: Convolutions = "others",
    fused: Fused = "split",
) -> Basis:
    """The terms of the method's merge, its singular values calibrated."""
    merging = METHODS[method]
    options = merging.complete({})
    size = merging.default(len(experts), options) if scale is None else scale
    merged = merging.prepare(base, experts, **options)
    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused)

    def rows(name: str) -> list[torch.Tensor]:
        terms = [row * size for row in merged.rows(name)]
        parts = matrices_in(name, base.shape(name), selection)
        deltas = finite_task_vectors(base, experts, name) if parts else []
        for part in parts:
            own = [part.view(term) for term in terms]
            svd = decompose(precise_sum(own), None, part.draws(), place_of(base), own[0].dtype)
            svd = svd.top(numerical_rank(svd.values, part.shape, own[0].dtype))
            factors = calibration(svd, [part.view(delta) for delta in deltas], alpha)
            for term, matrix in zip(terms, own, strict=True):
                part.put(calibrated(matrix, svd, factors), term)
        return terms

    return Basis("delta", len(experts), rows)


def calibration(
    merged: Svd, deltas: Sequence[torch.Tensor], alpha: float | None = None
) -> torch.Tensor:
    """``γ_r`` of every singular value of a merge, ``(r,)``.

    Args:
        merged: Decomposition of the merge, without singular values of zero.
        deltas: τ_i, ``(m, n)`` each.
        alpha: α; None for one over the number of the experts that changed the matrix.
    """
    import torch

    response = merged.values[:, None] * merged.right  # a_r
    changed = [delta.to(response.dtype) for delta in deltas if bool(delta.any())]
    least = 1 / max(1, len(changed)) if alpha is None else alpha
    counted = torch.zeros_like(merged.values)
    total = torch.zeros_like(merged.values)
    for delta in changed:
        own = merged.left.T @ delta  # a_r^i
        squares = own.square().sum(1)
        noise = torch.finfo(deltas[0].dtype).eps * max(delta.shape) * float(delta.norm())
        answers = squares > noise**2
        exaggeration = (response * own).sum(1) / squares.clamp_min(noise**2)  # s_r^i
        total += exaggeration.clamp_min(least) * answers
        counted += answers
    # γ_r = K / Σ_i max(α, s_r^i)
    return torch.where(counted > 0, counted / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)


def calibrated(matrix: torch.Tensor, merged: Svd, factors: torch.Tensor) -> torch.Tensor:
    """``U diag(γ) Uᵀ`` times a matrix; what lies outside the columns of U stays."""
    wide = precise(matrix)
    left = merged.left.to(wide.device, wide.dtype)
    return wide + left @ ((factors.to(wide) - 1)[:, None] * (left.T @ wide))


def _refuse(layout: Layout, experts: int, options: Options) -> str | None:
    method = METHODS[options["method"]]
    return None if method.refuse is None else method.refuse(layout, experts, method.complete({}))


SVC = Operator(
    name="svc",
    prepare=prepare,
    summary="another method's merge, its singular values scaled down where experts share them",
    paper="Li 2026, When shared knowledge hurts",
    family="spectral",
    scope="G",
    identities=frozenset(
        {
            "base_at_zero",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
            "default_ignores_zero_vector",
        }
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.3, 2.0),
    refuse=_refuse,
    # Terms and task vectors, what TSV holds for the terms, and the decomposition of their sum.
    copies=lambda experts: 9 * experts + 16,
    when="on top of task arithmetic or TIES, where a few shared directions drown the rest",
)
