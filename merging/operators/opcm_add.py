"""One more expert for a finished OPCM merge: the step of OPCM, from what the merge itself holds.

Tang 2025, "Merging models on the fly without retraining: a sequential approach to scalable
continual model merging". The step needs nothing of the experts that joined before but their number
and one factor. The merge so far is base + f S, where S is the sum of the cleaned task vectors (see
:mod:`mergesearch.merging.operators.opcm`) and f S has the mean norm of the n task vectors. A new
task vector τ is cleaned of what overlaps with S to τ', and the new merge is base + f' (S + τ') with
f' = (n ‖f S‖ + ‖τ‖) / ((n + 1) ‖S + τ'‖).

The two sources are the finished merge and the new expert, in this order. Each has a direction and a
coefficient; 1 for both gives OPCM of all experts, within the rounding of the merge as it was
stored. In fp32 that is not seen; in bf16 it takes changes of less than a 250th of a weight away.

``joined=1, factor=1`` begins with an expert as the merge of one. ``mergesearch add`` fills both in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.opcm import Alpha, clean
from mergesearch.merging.operators.parts.decomposition import decompose
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Selection,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: Tensor name -> the merge so far as a task vector, and the cleaned one of the new expert.
Terms = Callable[[str], list["torch.Tensor"]]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    joined: Annotated[
        int, Field(ge=1, description="number of experts that the first source is a merge of")
    ] = 1,
    factor: Annotated[
        float, Field(gt=0, description="by which the sum of their cleaned task vectors was scaled")
    ] = 1.0,
    alpha: Alpha = 0.5,
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
) -> Basis:
    """The merge so far and the new expert's cleaned task vector, both scaled anew."""
    terms = _terms(base, experts, alpha, matrices, conv, fused)
    key = [alpha, matrices, conv, fused]
    following = _factor(base, experts, terms, joined, factor, key)

    def rows(name: str) -> list[torch.Tensor]:
        merged, cleaned = terms(name)
        return [merged.mul_(following / factor), cleaned.mul_(following)]

    return Basis("delta", 2, rows)


def factor_after(
    base: TensorSource,
    experts: Sequence[TensorSource],
    joined: int,
    factor: float,
    alpha: float,
    matrices: Literal["all", "blocks"],
    conv: Literal["others", "reshape"],
    fused: Literal["split", "whole"],
) -> float:
    """f', by which the new merge has scaled the sum of all cleaned task vectors."""
    terms = _terms(base, experts, alpha, matrices, conv, fused)
    return _factor(base, experts, terms, joined, factor, [alpha, matrices, conv, fused])


def _terms(
    base: TensorSource,
    experts: Sequence[TensorSource],
    alpha: float,
    matrices: Literal["all", "blocks"],
    conv: Literal["others", "reshape"],
    fused: Literal["split", "whole"],
) -> Terms:
    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others="sum")

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        merged, new = deltas
        return [merged, _cleaned(base, experts, part, merged, new, alpha)]

    return rows_by_matrix(base, experts, selection, formula)


def _cleaned(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    merged: torch.Tensor,
    new: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """τ' of one matrix."""

    def compute() -> dict[str, torch.Tensor]:
        svd = decompose(merged.double(), None, part.draws(), place_of(base), merged.dtype)
        return {"vector": clean(new.double(), svd, alpha, new.dtype).to(new.dtype)}

    key = ["task vector cleaned of a merge", *part.key, alpha]
    return remembered([base, *experts], key, compute)["vector"].to(new.device)


def _factor(
    base: TensorSource,
    experts: Sequence[TensorSource],
    terms: Terms,
    joined: int,
    factor: float,
    key: Sequence[object],
) -> float:
    """f', from one pass over the model."""

    def compute() -> dict[str, torch.Tensor]:
        import torch

        lengths = [0.0, 0.0]
        total = 0.0
        for name in base.names:
            whole = task_vectors(base, experts, name)
            lengths = [
                one + dot(vector, vector) for one, vector in zip(lengths, whole, strict=True)
            ]
            merged, cleaned = terms(name)
            following = merged.double() / factor + cleaned.double()
            total += dot(following, following)
        merge, new = map(math.sqrt, lengths)
        mean = (joined * merge + new) / (joined + 1)
        # Task vectors that cancel out leave nothing to scale.
        scale = mean / math.sqrt(total) if total > 0 else 1.0
        return {"factor": torch.tensor(scale, dtype=torch.float64)}

    what = ["norm of a merge and one more", joined, factor, *key]
    return float(remembered([base, *experts], what, compute)["factor"])


OPCM_ADD = Operator(
    name="opcm_add",
    prepare=prepare,
    summary="one more expert for a finished OPCM merge, without the experts that joined before",
    paper="Tang 2025, Merging models on the fly without retraining",
    family="spectral",
    scope="G",
    identities=frozenset({"base_at_zero", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 2.0),
    directions=lambda _experts, _options: 2,
    experts=(2, 2),
    copies=lambda experts: 3 * experts + 20,
    order_sensitive=True,
    when="by `mergesearch add`, where earlier experts are gone or too many to read again",
)
