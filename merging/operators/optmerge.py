"""OptMerge (WUDI v2): WUDI on the largest singular values of the task vectors.

Wei 2025, "Unifying multimodal large language model capabilities and modalities via model merging":
per matrix, minimise Σ_k ‖(X − T_k) A_kᵀ‖² / ‖τ_k‖², where A_k = Σ_k V_kᵀ holds the r = ⌊min(m, n) /
K⌋ largest singular values of τ_k with their right singular vectors.

* ``full`` (fully fine-tuned experts): T_k = τ̄ + the r largest singular components of τ_k − τ̄,
  from X_0 = Σ τ_k. The authors take 300 steps of Adam with rate 1e-5. Adam has no closed form and
  moves all elements at one speed, so that its result depends on the scale of the task vectors; here
  the same quadratic is solved by gradient flow for ``time``, as in WUDI's closed form.
* ``lora`` (low-rank experts): T_k = the r largest singular components of τ_k, from X_0 = τ̄. The
  authors take 300 steps of gradient descent with rate 1e-4 and momentum 0.9; that is linear in X,
  and ``steps`` of it are worked out exactly. They move X by little: the result is close to the
  average.

Both are sums over experts, so that each keeps a coefficient; 1 reproduces the merge, which the
authors then scale by 0.1 to 1.5. r is at least 1. As in the paper only matrices inside blocks are
merged, the rest stays the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import decompose, precise
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.interference import (
    gradient_flow,
    momentum_descent,
    settled,
    spectrum_of,
)
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Others,
    Selection,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.singular import singular
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: The authors' gradient descent on low-rank experts.
RATE = 1e-4
MOMENTUM = 0.9

#: ``U`` ``(m, r)`` and ``Σ Vᵀ`` ``(r, n)`` of the r largest singular values of a matrix.
Components = tuple["torch.Tensor", "torch.Tensor"]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    form: Annotated[
        Literal["full", "lora"],
        Field(description="for fully fine-tuned experts, or for low-rank ones"),
    ] = "full",
    time: Annotated[
        float, Field(gt=0, description="how long the gradient flow runs, in the form 'full'")
    ] = 300.0,
    steps: Annotated[
        int, Field(ge=1, description="steps of gradient descent, in the form 'lora'")
    ] = 300,
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "base",
) -> Basis:
    """The terms of the merged matrix, one per expert."""
    share = 1.0 if form == "full" else 1.0 / len(experts)  # X_0 = Σ τ_k, or τ̄

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        deltas = [precise(delta) for delta in deltas]
        squared = [dot(delta, delta) for delta in deltas]
        components = _largest(base, experts, part, deltas)
        targets = (
            _demeaned(base, experts, part, deltas) if form == "full" else _product_of(components)
        )
        inputs = [right for _, right in components]  # A_k = Σ_k V_kᵀ
        spectrum = spectrum_of(inputs, squared)
        flow = gradient_flow(spectrum.values, time)
        moved = flow if form == "full" else momentum_descent(spectrum.values, RATE, MOMENTUM, steps)
        return settled(
            [delta * share for delta in deltas], inputs, targets, squared, spectrum, moved
        )

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def _rank(part: MatrixPart, experts: int) -> int:
    """``r = ⌊min(m, n) / K⌋``, at least 1."""
    return max(1, min(part.shape) // experts)


def _largest(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
) -> list[Components]:
    """The r largest singular components of every task vector."""
    rank = _rank(part, len(experts))
    svds = [
        singular(base, expert, part, delta, rank)
        for expert, delta in zip(experts, deltas, strict=True)
    ]
    return [(svd.left, svd.values[:, None] * svd.right) for svd in svds]


def _product_of(components: Sequence[Components]) -> Callable[[int], torch.Tensor]:
    """``k -> T_k = U_k Σ_k V_kᵀ``."""

    def target(k: int) -> torch.Tensor:
        left, right = components[k]
        return left @ right

    return target


def _demeaned(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
) -> Callable[[int], torch.Tensor]:
    """``k -> T_k``, which is τ̄ plus the r largest singular components of ``τ_k − τ̄``."""
    rank = _rank(part, len(experts))
    mean = sum(deltas[1:], deltas[0]) / len(deltas)

    def target(k: int) -> torch.Tensor:
        def compute() -> dict[str, torch.Tensor]:
            svd = decompose(deltas[k] - mean, rank, part.draws(), place_of(base))
            return {"left": svd.left.contiguous(), "right": svd.values[:, None] * svd.right}

        key = ["singular components of a task vector less the mean", *part.key, k, rank]
        factors = remembered([base, *experts], key, compute)
        return mean + factors["left"].to(mean.device) @ factors["right"].to(mean.device)

    return target


OPTMERGE = Operator(
    name="optmerge",
    prepare=prepare,
    summary="WUDI on the largest singular values, for fully fine-tuned or low-rank experts",
    paper="Wei 2025, Unifying multimodal large language model capabilities and modalities via "
    "model merging",
    family="spectral",
    scope="T",
    identities=frozenset({"base_at_zero", "permutation", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.1, 1.5),
    # Task vectors, starts, rows of matrices and of tensors; factors, mean and one decomposition.
    copies=lambda experts: 4 * experts + 14,
    when="for multimodal language models and LoRA experts, with nothing but weights",
)
