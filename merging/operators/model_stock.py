"""Model Stock: pull the average towards the base, further the less the experts agree.

Jang 2024, "Model Stock: all we need is just a few fine-tuned models", Eq. 2 for any number of
experts: with the angle θ between task vectors, merged = t · average + (1 − t) · base and t = K cos
θ / (1 + (K − 1) cos θ), per tensor.

The paper's geometry has one angle; here cos θ is the mean over all pairs, as is usual for more than
two experts. One expert is left as it is (t = 1), which the paper does not define. Opposed task
vectors would give t < 0: t is kept within [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.inner_products import cosine
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """The task vectors times t / K, with t from their angles."""

    def rows(name: str) -> list[torch.Tensor]:
        deltas = task_vectors(base, experts, name)
        # t · average + (1 − t) · base = base + Σ_k t/K · τ_k
        scale = interpolation_ratio(deltas) / len(deltas)
        return [delta.mul_(scale) for delta in deltas]

    return Basis("delta", len(experts), rows)


def interpolation_ratio(deltas: Sequence[torch.Tensor]) -> float:
    """t of Eq. 2: the share of the average in the merge, in [0, 1]."""
    count = len(deltas)
    if count == 1:
        return 1.0
    cosines = [cosine(one, other) for one, other in combinations(deltas, 2)]
    mean = sum(cosines) / len(cosines)
    # Eq. 2: t = K cos θ / (1 + (K − 1) cos θ). For a mean cosine below 0 the numerator is negative
    # while the denominator may vanish.
    return count * mean / (1 + (count - 1) * mean) if mean > 0 else 0.0


MODEL_STOCK = Operator(
    name="model_stock",
    prepare=prepare,
    summary="the average, pulled towards the base where the experts disagree",
    paper="Jang 2024, Model Stock: all we need is just a few fine-tuned models",
    family="linear",
    scope="T",
    identities=frozenset(
        {
            "base_at_zero",
            "single_expert",
            "identical_experts",
            "permutation",
            "linearity",
            "homogeneity",
        }
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    copies=lambda experts: experts + 2,
    row_form=lambda _options: "stored",
    when="for two or three fine-tunings of one task",
)
