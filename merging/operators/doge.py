"""DOGE: task vectors corrected along what they do not share.

Wei 2025, "Modeling multi-task model merging as adaptive projective gradient descent", the data-free
variant for task arithmetic. Per matrix, with λ_k = η / ‖τ_k‖:

1. The shared subspace: the ⌊s/K⌋ first left singular vectors of every τ_k (s = min(m, n)) are put
   side by side, and the ⌊s/subspace⌋ first left singular vectors of that are kept. Π projects onto
   them.
2. One δ for all experts minimises L = Σ_j Σ_rows (Σ_columns τ_j ⊙ (τ_j − Σ_i λ_i (τ_i + δ)))² by
   Adam from 0, on the gradient without its part in the shared subspace, (I − Π) ∇L. Adam rescales
   elements, so that δ itself is not free of that part.
3. merged = base + Σ_k λ_k · M_k ⊙ (τ_k + δ); M_k keeps the largest magnitudes of τ_k over all
   matrices of the model.

With ``correction="own"`` every expert has a δ_k of its own, Σ_i λ_i (τ_i + δ_i) stands in L, and
the terms are M_k ⊙ (τ_k + δ_k). This is the paper's variant for AdaMerging, which goes on from
there with coefficients by tensor: without ``scaled`` the terms are not brought to one length, and
start at 0.3. (There the authors' divisor ``subspace`` is the number of experts.) The gradients of
the δ_k are multiples λ_k of one, of which Adam sees little: the δ_k differ by what ε does to small
gradients, and the variant by no more.

Each term is a direction with a coefficient of its own; 1 reproduces DOGE. ``subspace`` is a
divisor, in the authors' code as here. Singular vectors of numerically zero singular values, which
are arbitrary, are left out of the shared subspace, and K counts the experts that changed the
matrix: one that did not takes no part. Elements of τ_k that are 0 are never kept. Only matrices
inside blocks are merged, as in the paper; the rest stays the base's. Adam's steps depend on the
scale of task vectors: twice the task vectors do not give twice the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import decompose, numerical_rank, precise
from mergesearch.merging.operators.parts.election import Fractional
from mergesearch.merging.operators.parts.inner_products import norm
from mergesearch.merging.operators.parts.magnitudes import (
    Histogram,
    count_kept,
    kth_largest,
    magnitude_histogram,
)
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Others,
    Selection,
    is_matrix,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.singular import singular
from mergesearch.merging.operators.parts.task_vectors import difference, vector_label
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

#: Adam's settings: Kingma 2015, "Adam: a method for stochastic optimization", with the authors'
#: rate.
RATE = 1e-4
MEAN_DECAY = 0.9
SQUARE_DECAY = 0.999
EPSILON = 1e-8


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    eta: Annotated[
        float, Field(gt=0, description="length that each task vector of a matrix is scaled to")
    ] = 0.07,
    density: Annotated[
        Fractional, Field(description="fraction of elements that is kept, over all matrices")
    ] = 0.3,
    subspace: Annotated[
        int, Field(ge=1, description="the shared subspace has min(m, n) over this dimensions")
    ] = 6,
    steps: Annotated[int, Field(ge=0, description="steps of Adam towards the correction")] = 400,
    correction: Annotated[
        Literal["shared", "own"],
        Field(description="one correction for all experts, or one for each"),
    ] = "shared",
    scaled: Annotated[
        bool, Field(description="whether the terms of a matrix are brought to the length eta")
    ] = True,
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "base",
) -> Basis:
    """The corrected, thinned and scaled task vectors."""
    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    thresholds = [_threshold(base, expert, selection, density) for expert in experts]

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        lengths = [norm(delta) for delta in deltas]
        # λ_k = η / ‖τ_k‖
        scales = [eta / length if length > 0 else 0.0 for length in lengths]
        key: list[Any] = [eta, subspace, steps, *(["own"] if correction == "own" else [])]
        found = _correction(base, experts, part, deltas, scales, key)
        each = found.expand(len(deltas), *part.shape)
        lengths = scales if scaled else [1.0] * len(scales)
        return [
            _corrected(delta, own, scale, threshold)
            for delta, own, scale, threshold in zip(deltas, each, lengths, thresholds, strict=True)
        ]

    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def _corrected(
    delta: torch.Tensor, correction: torch.Tensor, scale: float, threshold: float
) -> torch.Tensor:
    """Step 3: ``λ_k · M_k ⊙ (τ_k + δ)``."""
    dropped = (delta.abs() < threshold) | (delta == 0)
    return scale * (delta + correction).masked_fill_(dropped, 0.0)


def _threshold(
    base: TensorSource, expert: TensorSource, selection: Selection, density: float
) -> float:
    """Magnitude from which on M_k keeps elements of a task vector; 0 if there is no matrix."""

    def matrices() -> Iterator[tuple[str, torch.Tensor]]:
        for name in base.names:
            if is_matrix(name, base.shape(name), selection):
                yield vector_label(expert, name), difference(expert.read(name), base.read(name))

    def compute() -> dict[str, torch.Tensor]:
        return magnitude_histogram(matrices, place=place_of(base)).to_tensors()

    stacks = ["stacks"] if selection.stacks else []
    key = ["magnitudes of matrices", selection.matrices, selection.conv, *stacks]
    first = Histogram.from_tensors(remembered([base, expert], key, compute))
    if not first.total:
        return 0.0
    rank = count_kept(density, first.total)
    return kth_largest(matrices, rank, first=first, place=place_of(base))


def _correction(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
    scales: Sequence[float],
    key: list[Any],
) -> torch.Tensor:
    """Step 2: δ, ``(m, n)``, or all δ_k, ``(K, m, n)``, in the dtype of the task vectors.

    Args:
        base: The base.
        experts: The experts.
        part: Which matrix.
        deltas: τ_k, ``(m, n)`` each.
        scales: λ_k.
        key: η, the divisor of the shared subspace, the number of steps, and ``own`` for all δ_k.
    """
    _, divisor, steps, *own = key

    def compute() -> dict[str, torch.Tensor]:
        shared = shared_subspace(base, experts, part, deltas, int(divisor))
        found = (descend_each if own else descend)(deltas, scales, shared, int(steps))
        return {"delta": found.to(deltas[0].dtype)}

    return remembered(
        [base, *experts], ["correction common to task vectors", *part.key, *key], compute
    )["delta"].to(deltas[0].device)


def shared_subspace(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
    divisor: int,
) -> torch.Tensor:
    """Step 1: its orthonormal columns ``(m, r)``, with r at most ``⌊min(m, n) / divisor⌋``."""
    import torch

    share = min(part.shape) // max(1, sum(bool(delta.any()) for delta in deltas))
    svds = [
        singular(base, expert, part, delta, share)
        for expert, delta in zip(experts, deltas, strict=True)
    ]
    dtype = deltas[0].dtype
    vectors = torch.cat(
        [svd.left[:, : numerical_rank(svd.values, part.shape, dtype)] for svd in svds], dim=1
    )
    if vectors.shape[1] == 0:
        return vectors
    joint = decompose(vectors, max(1, min(part.shape) // divisor), None, place_of(base))
    return joint.left[
        :, : min(min(part.shape) // divisor, numerical_rank(joint.values, vectors.shape, dtype))
    ]


def descend(
    deltas: Sequence[torch.Tensor], scales: Sequence[float], shared: torch.Tensor, steps: int
) -> torch.Tensor:
    """δ after ``steps`` of Adam on the projected gradient ``(I − Π) ∇L``.

    With Λ = Σ_i λ_i and c_j = Σ_columns τ_j ⊙ (τ_j − Σ_i λ_i τ_i), ∇L is −2 Λ Σ_j r_j ⊙ τ_j for the
    residuals r_j = c_j − Λ Σ_columns τ_j ⊙ δ, one number per row and expert.

    Args:
        deltas: τ_k, ``(m, n)`` each.
        scales: λ_k.
        shared: Columns of the shared subspace, ``(m, r)``.
        steps: Number of steps.
    """
    import torch

    # By rows (m, K, n): a row's products with all experts are one small matrix product.
    vectors = torch.stack([precise(delta) for delta in deltas], dim=1)
    weights = vectors.new_tensor(scales)
    total = float(weights.sum())  # Λ
    # c_j
    constant = (vectors * (vectors - (weights[:, None] * vectors).sum(1, keepdim=True))).sum(2)
    shared = shared.to(vectors.dtype)
    delta, mean, square = (torch.zeros_like(vectors[:, 0]) for _ in range(3))
    for step in range(1, steps + 1):
        # r_j, ∇L, and (I − Π) ∇L
        residuals = constant - total * (vectors @ delta[:, :, None])[:, :, 0]
        gradient = (-2 * total * residuals[:, None] @ vectors)[:, 0]
        gradient -= shared @ (shared.T @ gradient)
        _take_step(step, gradient, delta, mean, square)
    return delta


def descend_each(
    deltas: Sequence[torch.Tensor], scales: Sequence[float], shared: torch.Tensor, steps: int
) -> torch.Tensor:
    """δ_k of all experts, ``(K, m, n)``, after ``steps`` of Adam on ``(I − Π) ∂L/∂δ_k``.

    With c_j as in :func:`descend`, r_j = c_j − Σ_columns τ_j ⊙ Σ_i λ_i δ_i, and ∂L/∂δ_k is −2 λ_k
    Σ_j r_j ⊙ τ_j.
    """
    import torch

    vectors = torch.stack([precise(delta) for delta in deltas])
    weights = vectors.new_tensor(scales)[:, None, None]
    # c_j, (K, m)
    constant = (vectors * (vectors - (weights * vectors).sum(0))).sum(2)
    shared = shared.to(vectors.dtype)
    own, mean, square = (torch.zeros_like(vectors) for _ in range(3))
    for step in range(1, steps + 1):
        residuals = constant - (vectors * (weights * own).sum(0)).sum(2)
        common = (residuals[:, :, None] * vectors).sum(0)
        common -= shared @ (shared.T @ common)
        _take_step(step, -2 * weights * common, own, mean, square)
    return own


def _take_step(
    step: int,
    gradient: torch.Tensor,
    value: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
) -> None:
    """Kingma 2015, Algorithm 1, in place: moments, their bias corrections, step."""
    mean.lerp_(gradient, 1 - MEAN_DECAY)
    square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
    deviation = (square / (1 - SQUARE_DECAY**step)).sqrt_().add_(EPSILON)
    value.addcdiv_(mean, deviation, value=-RATE / (1 - MEAN_DECAY**step))


DOGE = Operator(
    name="doge",
    prepare=prepare,
    summary="task vectors of one length, thinned, and corrected along what they do not share",
    paper="Wei 2025, Modeling multi-task model merging as adaptive projective gradient descent",
    family="spectral",
    scope="G",
    identities=frozenset(
        {"base_at_zero", "permutation", "linearity", "zero_vector", "default_ignores_zero_vector"}
    ),
    # Without a common length, where AdaMerging starts.
    default=lambda _experts, options: 1.0 if options["scaled"] else 0.3,
    bounds=lambda _experts, _options: (0.0, 2.0),
    # Task vectors as they are read and stacked by rows, products of them, rows of matrices and of
    # tensors; δ, its gradient, its moments and the decompositions.
    copies=lambda experts: 8 * experts + 9,
    when="for experts of very different lengths, with minutes of preparation to spare",
)
