"""SCE: select where experts disagree, weigh experts by their energy there, erase minority signs.

Wan 2024, "FuseChat: knowledge fusion of chat models" (second version), per tensor:

* Select: the ``topk`` fraction of the positions with the largest variance across experts, counted
  among the positions whose variance is not 0.
* Calculate: η_k ∝ E[τ'_k²] with τ' the task vector at the selected positions.
* Erase: e_k = 1 where the entry has the sign of the sum; merged = base + Σ_k η_k e_k τ_k / Σ_k η_k
  e_k.

What Select applies to differs between the paper and its code. The authors' code uses the selection
for the weights η alone and merges whole task vectors (``select_applies_to: weights``, the default);
the text of the paper and mergekit merge the selected positions alone (``deltas``). With one expert
no position varies: the former then gives the expert, the latter the base.

Both elect the positive sign where the sum is exactly 0, so that negating all task vectors does not
negate the result; here nothing is added there. Counts are rounded up and ties are selected
together, so that small tensors are not left out. mergekit also takes equal weights once the mean
squares add up to less than 1e-6, as they do for most fine-tuned models; here weights do not depend
on the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import Fractional, elect
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.magnitudes import count_kept, kth_largest
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.operators.varm import shares_of
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch

Topk = Annotated[
    Fractional, Field(description="fraction of the varying positions that are selected")
]
Target = Annotated[
    Literal["deltas", "weights"],
    Field(
        description="what is restricted to the selection: the merged task vectors too, or the "
        "weights alone"
    ),
]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    topk: Topk = 0.1,
    select_applies_to: Target = "weights",
) -> Basis:
    """Task vectors times their share of the energy of the elected sign."""

    def rows(name: str) -> list[torch.Tensor]:
        vectors = finite_task_vectors(base, experts, name)
        if topk >= 1:
            return _erase_minorities(vectors, _shares(vectors))
        mask = most_varying(vectors, topk, name)  # Select
        selected = [vector * mask for vector in vectors]
        weights = _shares(selected)  # Calculate
        return _erase_minorities(selected if select_applies_to == "deltas" else vectors, weights)

    return Basis("delta", len(experts), rows)


def _shares(vectors: Sequence[torch.Tensor]) -> list[float]:
    """``η_k = E[τ'_k²] / Σ_j E[τ'_j²]``; the number of elements cancels."""
    return shares_of([dot(vector, vector) for vector in vectors])


def most_varying(vectors: Sequence[torch.Tensor], topk: float, name: str) -> torch.Tensor:
    """Mask of the positions with the largest variance across experts, in the shape of a vector."""
    variance = variance_across(vectors)
    varying = int(variance.count_nonzero())
    if varying == 0:
        return variance > 0
    return variance >= kth_largest(lambda: [(name, variance)], count_kept(topk, varying))


def variance_across(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Variance across experts, K tensors ``S`` -> ``S``; exactly 0 where all are equal."""
    import torch

    # Of differences from the first vector: the mean of equal numbers may differ from them by
    # rounding, the mean of zeros is 0.
    mean = torch.zeros_like(vectors[0])
    variance = torch.zeros_like(vectors[0])
    for vector in vectors:
        mean += vector - vectors[0]
    mean /= len(vectors)
    for vector in vectors:
        variance += (vector - vectors[0]).sub_(mean).square_()
    return variance / len(vectors)


def _erase_minorities(
    vectors: Sequence[torch.Tensor], weights: Sequence[float]
) -> list[torch.Tensor]:
    """``η_k e_k τ_k / Σ_j η_j e_j``, overwriting the vectors; 0 where no weight is left."""
    import torch

    kept = elect(vectors, "sum", majority=lambda: 0)  # e_k τ_k
    total = torch.zeros_like(kept[0])
    for vector, weight in zip(kept, weights, strict=True):
        # Σ_j η_j e_j
        total += (vector != 0).to(total.dtype) * weight
    total.masked_fill_(total == 0, 1.0)
    return [vector.mul_(weight / total) for vector, weight in zip(kept, weights, strict=True)]


_IDENTITIES = frozenset(
    {
        "base_at_zero",
        "single_expert",
        "identical_experts",
        "permutation",
        "linearity",
        "homogeneity",
    }
)

SCE = Operator(
    name="sce",
    prepare=prepare,
    summary="experts weighted by their energy where they disagree most, minority signs erased",
    paper="Wan 2024, FuseChat",
    family="sparse",
    scope="T",
    identities=_IDENTITIES,
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    plain={"topk": 1.0},
    plain_identities=_IDENTITIES | {"zero_vector", "default_ignores_zero_vector"},
    copies=lambda experts: 3 * experts + 5,
    row_form=lambda _options: "masked",
    when="for chat models distilled into one shape, with few experts",
)
