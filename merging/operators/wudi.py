"""WUDI in closed form (SWUDI): the summed task vectors, moved to where they interfere least.

Cheng 2025, "Whoever started the interference should end it: guiding data-free model merging via
task vectors", minimises Σ_k ‖(X − τ_k) τ_kᵀ‖² / ‖τ_k‖² per matrix by some hundred steps of Adam.
The objective is a quadratic, so that gradient flow from the start X_0 has a closed form, which is
what the authors' SWUDI uses. With C = Σ_k τ_kᵀτ_k / ‖τ_k‖² = V diag(λ) Vᵀ and D = Σ_k τ_k τ_kᵀτ_k /
‖τ_k‖²:

* X = X_0 − X_0 V f Vᵀ + D V (f/λ) Vᵀ.
* f = 1 − exp(−λ · time) for the largest eigenvalues λ, and 0 for the rest.

The closed form is deterministic, and a sum over experts, so that each keeps a coefficient. Adam's
iterates differ from it: Adam moves all elements at one speed, whatever the scale of the task
vectors.

``time=300, keep=0.65`` are the authors' for CLIP; for language models they use ``keep=0.85``. Their
ASWUDI goes to the minimum on as many eigenvectors as the participation ratio of √λ counts, or
Gavish and Donoho's threshold for language models: ``rank="participation"`` or ``"gavish_donoho"``
with ``time=1e6``. The threshold here is the published one, for the matrix whose singular values the
√λ are (all task vectors one below the other); the authors' takes the ratio of the sides of a single
one, and a stand-in for the median of the Marchenko-Pastur law. Eigenvalues that are numerically
zero stay at the start. Embeddings, heads and vectors are averaged; the first authors leave them at
the base.

Coefficient 1 is the published merge for any start; from ``sum``, coefficients near 1/K suit
language models better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import precise
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.interference import (
    Spectrum,
    fast_spectrum_of,
    gradient_flow,
    settled,
    settled_task_vectors,
    spectrum_of,
)
from mergesearch.merging.operators.parts.magnitudes import count_kept
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Decompositions,
    Fused,
    Matrices,
    Others,
    Selection,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import Options, TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: The longest time for which ``fast`` decompositions are exact enough; precise ones serve beyond.
FAST_TIME = 1000.0

#: How the number of eigenvectors that move is chosen.
Rank = Literal["fixed", "participation", "gavish_donoho"]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    time: Annotated[float, Field(gt=0, description="how long the gradient flow runs")] = 300.0,
    keep: Annotated[
        float,
        Field(gt=0, le=1, description="fraction of eigenvectors that move, for the rank 'fixed'"),
    ] = 0.65,
    start: Annotated[
        Literal["sum", "mean", "zero"],
        Field(description="where the flow starts: sum or mean of task vectors, or 0"),
    ] = "sum",
    rank: Annotated[
        Rank,
        Field(
            description="how many eigenvectors move: a fixed fraction, or chosen from the spectrum"
        ),
    ] = "fixed",
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "mean",
    decompositions: Decompositions = "precise",
) -> Basis:
    """The terms of the merged matrix, one per expert."""
    share = {"sum": 1.0, "mean": 1.0 / len(experts), "zero": 0.0}[start]
    # f/λ goes up to time, and so do roundings.
    fast = decompositions == "fast" and time <= FAST_TIME

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        deltas = [precise(delta, fast) for delta in deltas]
        squared = [dot(delta, delta) for delta in deltas]
        spectrum = _remembered_spectrum(base, experts, part, deltas, squared, fast)
        count = count_kept(keep, part.shape[1]) if rank == "fixed" else chosen_rank(spectrum, rank)
        # f = 1 − exp(−λ · time) on the largest eigenvalues
        moved = gradient_flow(spectrum.values, time).of_largest(count)
        if fast:
            return settled_task_vectors(share, deltas, squared, spectrum, moved)
        starts = [delta * share for delta in deltas]
        return settled(starts, deltas, deltas.__getitem__, squared, spectrum, moved)

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def _remembered_spectrum(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
    squared_norms: Sequence[float],
    fast: bool,
) -> Spectrum:
    """Eigenvectors of C = Σ_k τ_kᵀτ_k / ‖τ_k‖², which depend on no other hyperparameter."""

    def compute() -> dict[str, torch.Tensor]:
        if fast:
            spectrum = fast_spectrum_of(deltas, squared_norms, part.draws(), place_of(base))
        else:
            spectrum = spectrum_of(deltas, squared_norms)
        return {"values": spectrum.values, "vectors": spectrum.vectors}

    key = ["eigenvectors of the Gram matrices of task vectors", *part.key]
    key += ["fast"] if fast else []
    tensors = remembered([base, *experts], key, compute)
    values, vectors = (tensors[name].to(deltas[0].device) for name in ("values", "vectors"))
    return Spectrum(values, vectors, (len(deltas) * part.shape[0], part.shape[1]))


def chosen_rank(spectrum: Spectrum, rule: Rank) -> int:
    """Number of eigenvectors that move, by a rule on the singular values ``y = √λ``.

    ``participation``: ⌈(Σ y)² / Σ y²⌉. ``gavish_donoho``: those above ω(β) · median(y), Gavish
    2014, "The optimal hard threshold for singular values is 4/√3", Eq. 5 for noise of unknown size;
    β is the lesser over the greater side.
    """
    import torch

    values = spectrum.values.sqrt()
    if values.numel() == 0:
        return 0
    if rule == "participation":
        # ⌈(Σ y)² / Σ y²⌉, where rounding just above a whole number gives that number
        return math.ceil(float(values.sum() ** 2 / (values**2).sum()) - 1e-6)
    lesser, greater = sorted(spectrum.sizes)
    beta = lesser / greater
    every = torch.cat([values, values.new_zeros(lesser - values.numel())])
    # Gavish 2014, Eq. 5: ω(β) ≈ 0.56 β³ − 0.95 β² + 1.82 β + 1.43
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((every > omega * every.quantile(0.5)).sum()))


def _bounds(_experts: int, options: Options) -> tuple[float, float]:
    # A sum overshoots where task vectors are alike; a mean does not.
    return (0.0, 1.5) if options["start"] == "sum" else (0.1, 1.5)


WUDI = Operator(
    name="wudi",
    prepare=prepare,
    summary="task vectors moved, in closed form, to where they interfere least with each other",
    paper="Cheng 2025, Whoever started the interference should end it",
    family="spectral",
    scope="T",
    identities=frozenset(
        {"base_at_zero", "single_expert", "permutation", "linearity", "homogeneity"}
    ),
    default=lambda _experts, _options: 1.0,
    bounds=_bounds,
    # Task vectors and rows; and in fp64 the Gram matrix with its eigenvectors, of the lesser of n
    # and K m rows: no larger than K matrices each, and that only where matrices are K times wider
    # than high.
    copies=lambda experts: 10 * experts + 6,
    when="for vision and language experts with nothing but weights, without a scale to tune",
)
