"""Interference between task vectors, and how far an optimiser reduces it.

WUDI (Cheng 2025) and OptMerge (Wei 2025) both minimise Σ_k ‖(X − T_k) A_kᵀ‖² / n_k in the merged
matrix X, for targets T_k ``(m, n)``, inputs A_k ``(., n)`` and squared norms n_k. Half its gradient
is X C − D, with C = Σ_k A_kᵀA_k / n_k and D = Σ_k T_k A_kᵀA_k / n_k. Along each eigenvector of C
(the columns of V, eigenvalues λ) X settles independently of the others, so that an optimiser comes
down to a factor f(λ) from 0 (not moved from the start X_0) to 1 (at the minimum):

    X = X_0 − X_0 V f Vᵀ + D V (f/λ) Vᵀ

For X_0 = Σ_k x_k this is a sum over experts; :func:`settled` gives its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.merging.operators.parts.decomposition import PRECISE_UP_TO, is_large
from mergesearch.merging.operators.parts.eigenvectors import largest_eigenvectors
from mergesearch.merging.operators.parts.sides import decompose_side
from mergesearch.merging.tensors.place import Place

if TYPE_CHECKING:
    import torch

#: Eigenvalues of C below this count as zero. C has trace K whatever the scale of the task vectors.
FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues above 0 of a symmetric positive matrix C, with their eigenvectors.

    Attributes:
        values: ``(r,)``, fp64, decreasing; r is 0 for C = 0.
        vectors: ``(n, r)``, in the dtype of what C was made from.
        sizes: Numbers of rows and columns of what C was made from; its rank is at most the lesser.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    sizes: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Filter:
    """How far X has settled along each eigenvector.

    Attributes:
        moved: ``(r,)``, f: 0 where nothing has moved, 1 at the minimum.
        gained: ``(r,)``, f/λ, worked out without a division by a small λ.
    """

    moved: torch.Tensor
    gained: torch.Tensor

    def of_largest(self, count: int) -> Filter:
        """The same for the ``count`` largest eigenvalues, and 0 for the others."""
        moved = self.moved.clone()
        gained = self.gained.clone()
        moved[count:] = 0.0
        gained[count:] = 0.0
        return Filter(moved, gained)


def spectrum_of(inputs: Sequence[torch.Tensor], squared_norms: Sequence[float]) -> Spectrum:
    """Eigenvalues and eigenvectors of ``C = Σ_k A_kᵀA_k / n_k``.

    They are worked out in fp64, because squares take twice the digits.

    Args:
        inputs: A_k, ``(p_k, n)`` each.
        squared_norms: n_k; an A_k with n_k = 0 is left out.
    """
    import torch

    scales = [1 / math.sqrt(squared) if squared > 0 else 0.0 for squared in squared_norms]
    sizes = sum(matrix.shape[0] for matrix in inputs), inputs[0].shape[1]
    if sizes[0] >= sizes[1]:
        gram = inputs[0].new_zeros((sizes[1], sizes[1]), dtype=torch.float64)
        for matrix, scale in zip(inputs, scales, strict=True):
            scaled = matrix.double() * scale
            gram.addmm_(scaled.T, scaled)
        values, vectors = _eigenvectors(gram)
    else:
        # C has no more eigenvalues above 0 than the inputs have rows: no need for all columns of
        # wide ones.
        stacked = torch.cat(
            [matrix.double() * scale for matrix, scale in zip(inputs, scales, strict=True)]
        )
        span, triangle = torch.linalg.qr(stacked.T)
        values, inside = _eigenvectors(triangle @ triangle.T)
        vectors = span @ inside
    kept = values.flip(0) > FLOOR
    return Spectrum(
        values.flip(0)[kept], vectors.flip(1)[:, kept].to(inputs[0].dtype).contiguous(), sizes
    )


def fast_spectrum_of(
    inputs: Sequence[torch.Tensor],
    squared_norms: Sequence[float],
    draws: torch.Generator,
    place: Place,
) -> Spectrum:
    """:func:`spectrum_of` of large fp32 inputs: half of C alone, or none of it where rank is low.

    Args:
        inputs: A_k.
        squared_norms: n_k.
        draws: For random columns, by which low rank is found.
        place: Where it is worked out.
    """
    import torch

    scales = [1 / math.sqrt(squared) if squared > 0 else 0.0 for squared in squared_norms]
    stacked = torch.cat([matrix * scale for matrix, scale in zip(inputs, scales, strict=True)])
    if not is_large(stacked, fast=True) or stacked.shape[0] < stacked.shape[1]:
        return spectrum_of(inputs, squared_norms)
    svd = decompose_side(stacked, draws, place, left=False)
    values = svd.values.double().square()
    kept = values > FLOOR
    rows, columns = stacked.shape
    return Spectrum(values[kept], svd.right[kept].T.contiguous(), (rows, columns))


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    import torch

    if gram.numel() <= PRECISE_UP_TO:
        return torch.linalg.eigh(gram)  # type: ignore[no-any-return]
    values, vectors = largest_eigenvectors(gram, len(gram))
    return values.flip(0), vectors.flip(1)


def gradient_flow(values: torch.Tensor, time: float) -> Filter:
    """``f = 1 − exp(−λ · time)`` of the flow dX/dt = D − X C."""
    import torch

    moved = -torch.expm1(-values * time)
    return Filter(moved, moved / values)


def momentum_descent(values: torch.Tensor, rate: float, momentum: float, steps: int) -> Filter:
    """f of gradient descent with momentum, on the gradient 2 (X C − D).

    Per eigenvector: v ← momentum · v + 2 λ e and e ← e − rate · v for the distance e from the
    minimum, as a fraction of that at the start. With e = 1 − λ g this is a recurrence of g = f/λ in
    which nothing is divided.
    """
    import torch

    velocity = torch.zeros_like(values)
    gained = torch.zeros_like(values)
    for _ in range(steps):
        velocity = momentum * velocity + 2 * (1 - values * gained)
        gained = gained + rate * velocity
    return Filter(values * gained, gained)


def settled_task_vectors(
    share: float,
    deltas: Sequence[torch.Tensor],
    squared_norms: Sequence[float],
    spectrum: Spectrum,
    moved: Filter,
) -> list[torch.Tensor]:
    """:func:`settled` of task vectors from a share of each, by the eigenvectors that move alone.

    Args:
        share: x_k / τ_k.
        deltas: τ_k, which are inputs and targets too.
        squared_norms: n_k.
        spectrum: Of C.
        moved: How far the eigenvectors have settled; 0 beyond some of the largest.
    """
    count = int((moved.moved > 0).sum())
    vectors = spectrum.vectors[:, :count]
    factor = (moved.moved[:count] * share).to(vectors.dtype)
    gained = moved.gained[:count].to(vectors.dtype)
    terms = []
    for delta, squared in zip(deltas, squared_norms, strict=True):
        inside = delta @ vectors
        change = -inside * factor
        if squared > 0:
            change += delta @ (delta.T @ inside) * (gained / squared)
        terms.append((delta * share).addmm_(change, vectors.T))
    return terms


def settled(
    starts: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Callable[[int], torch.Tensor],
    squared_norms: Sequence[float],
    spectrum: Spectrum,
    moved: Filter,
) -> list[torch.Tensor]:
    """The terms of X, one per expert: ``x_k − x_k V f Vᵀ + T_k (A_kᵀA_k / n_k) V (f/λ) Vᵀ``.

    Args:
        starts: x_k, ``(m, n)`` each.
        inputs: A_k.
        targets: T_k by its index.
        squared_norms: n_k.
        spectrum: Of C.
        moved: How far the eigenvectors have settled.
    """
    vectors = spectrum.vectors
    factor = moved.moved.to(vectors.dtype)
    gained = moved.gained.to(vectors.dtype)
    terms = []
    for k, (start, seen, squared) in enumerate(zip(starts, inputs, squared_norms, strict=True)):
        change = -(start @ vectors) * factor  # −x_k V f
        if squared > 0:
            # T_k (A_kᵀA_k / n_k) V (f/λ)
            change += targets(k) @ (seen.T @ (seen @ vectors)) * (gained / squared)
        terms.append(start + change @ vectors.T)
    return terms
