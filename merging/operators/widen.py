"""WIDEN: task vectors weighted column by column, by how much each column has changed.

Yu 2024, "Extend model merging from fine-tuned to pre-trained large language models via weight
disentanglement". A weight of shape (out, in) is taken apart into the norms of its columns and their
directions. Per expert, with w_k a column of the expert and w_0 that of the base:

* The changes Δμ_k = |‖w_k‖ − ‖w_0‖| and Δd_k = 1 − cos(w_k, w_0) of the n columns are ranked within
  the expert (rank / n, in [0, 1)).
* The score of a column is the softmax over experts of its ranks, or ``s`` where its rank is above
  ``t`` times the mean rank.
* The mean of both scores weighs the column of the task vector.

Vectors (norms, biases) are scored by |τ| itself, unranked.

Embeddings are scored per token, as if transposed. Stacks of experts and fused projections are read
as the matrices that they hold, other tensors with more axes (convolutions) as (out, rest); GPT-2
stores its linear layers transposed, so that there the columns are outputs. A column of zeros has no
direction: the change of direction is 0 if it stays zero, else 1, where the authors' code divides by
zero. Norms and angles are taken in fp64: 1 − cos of a fine-tuned column is often below what fp32
resolves, and ranks would be those of rounding errors.

The scores of a column add up to between 1 and K when s = 1, so that many similar experts overshoot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.matrices import Selection, matrices_in
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.roles import classify
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch

#: Columns widened to fp64 at a time.
_COLUMNS = 256


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    t: Annotated[
        float, Field(ge=0, description="ranks above t times their mean get the score s")
    ] = 1.0,
    s: Annotated[
        float, Field(ge=0, description="score of the columns that have changed most")
    ] = 1.0,
) -> Basis:
    """Task vectors times the scores of their columns."""

    def rows(name: str) -> list[torch.Tensor]:
        vectors = [vector.contiguous() for vector in finite_task_vectors(base, experts, name)]
        if vectors[0].dim() < 2 or vectors[0].numel() == 0:
            return [
                v * score for v, score in zip(vectors, _vector_scores(vectors, t, s), strict=True)
            ]
        origin = base.read(name)
        if name not in selection.stacks:
            # The matrices are views of the vectors.
            _score([_columns(v, name) for v in vectors], _columns(origin, name), t, s)
            return vectors
        if not selection.stacks[name].parts:
            return _stacked_vectors(vectors, t, s)
        for part in matrices_in(name, base.shape(name), selection):
            matrices = [part.view(vector).clone() for vector in vectors]
            _score(matrices, part.view(origin), t, s)
            for matrix, vector in zip(matrices, vectors, strict=True):
                part.put(matrix, vector)
        return vectors

    selection = Selection.of(base)
    return Basis("delta", len(experts), rows)


def _score(matrices: Sequence[torch.Tensor], origin: torch.Tensor, t: float, s: float) -> None:
    """Multiply the columns of task vectors ``(m, n)`` by their scores, in place."""
    changes = [_changes(matrix, origin) for matrix in matrices]
    magnitude = _rank_scores([change for change, _ in changes], t, s)
    direction = _rank_scores([change for _, change in changes], t, s)
    # (score of the norm + score of the direction) / 2 · τ_k, column by column
    for matrix, one, other in zip(matrices, magnitude, direction, strict=True):
        matrix.mul_(((one + other) / 2).to(matrix.dtype))


def _stacked_vectors(vectors: list[torch.Tensor], t: float, s: float) -> list[torch.Tensor]:
    """A stack of vectors ``(members, n)``, each scored as a vector of its own."""
    for member in range(vectors[0].shape[0]):
        own = [vector[member] for vector in vectors]
        for vector, score in zip(own, _vector_scores(own, t, s), strict=True):
            vector.mul_(score.to(vector.dtype))
    return vectors


def _columns(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor of two or more axes as a matrix ``(m, n)`` whose n columns are scored.

    It is a view if the tensor is contiguous.
    """
    if tensor.dim() <= 3 and classify(name).module == "embedding":
        return tensor.reshape(-1, tensor.shape[-1]).t()
    return tensor.reshape(tensor.shape[0], -1)


def _changes(vector: torch.Tensor, origin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes Δμ of norm and Δd of direction of every column, ``(n,)`` each, in fp64."""
    import torch

    parts = zip(
        torch.split(vector, _COLUMNS, dim=1), torch.split(origin, _COLUMNS, dim=1), strict=True
    )
    changes = [_changes_of_part(step.double(), start.double()) for step, start in parts]
    return torch.cat([norm for norm, _ in changes]), torch.cat([angle for _, angle in changes])


def _changes_of_part(step: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    before, after, moved = (
        torch.linalg.vector_norm(part, dim=0) for part in (start, start + step, step)
    )
    norm = (after - before).abs()  # Δμ = |‖w_k‖ − ‖w_0‖|
    # Δd = 1 − cos(w_k, w_0) by the law of cosines, ‖a − b‖² = (‖a‖ − ‖b‖)² + 2 ‖a‖ ‖b‖ (1 − cos),
    # which takes no difference of numbers near 1
    product = 2 * after * before
    cosine_gap = (moved.square() - norm.square()).clamp(min=0) / product.masked_fill(
        product == 0, 1.0
    )
    return norm, torch.where(product > 0, cosine_gap, (norm > 0).double())


def _rank_scores(changes: Sequence[torch.Tensor], t: float, s: float) -> torch.Tensor:
    """Scores ``(K, n)`` by the ranks of changes, K tensors ``(n,)``; ties rank by position."""
    import torch

    count = changes[0].numel()
    fractions = torch.arange(count, dtype=torch.float64, device=changes[0].device) / count
    ranks = torch.stack(
        [
            torch.empty_like(fractions).index_put_((change.argsort(stable=True),), fractions)
            for change in changes
        ]
    )
    # The mean rank as one division: added up, it might fall on either side of the middle rank.
    return _scores(ranks, t * ((count - 1) / 2 / count), s)


def _vector_scores(vectors: Sequence[torch.Tensor], t: float, s: float) -> torch.Tensor:
    """Scores ``(K, *shape)`` of vectors by their magnitudes |τ|, unranked."""
    import torch

    sizes = torch.stack([vector.abs() for vector in vectors])
    means = sizes.reshape(len(vectors), -1).mean(dim=1)
    return _scores(sizes, t * means.reshape(-1, *[1] * vectors[0].dim()), s)


def _scores(significance: torch.Tensor, limit: torch.Tensor | float, s: float) -> torch.Tensor:
    """Softmax over the first axis, or ``s`` where the significance is above the limit."""
    return significance.softmax(dim=0).masked_fill(significance > limit, s)


WIDEN = Operator(
    name="widen",
    prepare=prepare,
    summary="task vectors weighted by how much each column's norm and direction have changed",
    paper="Yu 2024, Extend model merging from fine-tuned to pre-trained large language models",
    family="column",
    scope="T",
    identities=frozenset({"base_at_zero", "single_expert", "permutation", "linearity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    # Matrices are overwritten; scores are of the size of a row.
    copies=lambda experts: experts + 4,
    when="for experts that have moved far, as by continued pre-training",
)
