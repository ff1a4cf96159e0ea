"""PCB-Merging: parameter competition balancing.

Du 2024, "Parameter competition balancing for model merging". Per expert, over the flattened whole
model, with A_k = |τ_k| clipped to its ``clip`` and 1 − ``clip`` quantiles and n(x) = (x − min) /
(max − min):

* Intra-balancing: intra_k = exp(K n(A_k)²).
* Inter-balancing inter_k, in three variants that the authors' repository holds side by side:
  ``vision``: tanh(τ_k Σ_j sign(τ_j) n(A_j)); ``evolution``: Σ_j tanh(sign(τ_k) n(A_k) sign(τ_j)
  n(A_j)); ``language``: tanh(τ_k Σ_j τ_j), there with clip 1e-4.
* The score b_k = intra_k · inter_k; s_k = n(b_k clipped from below at its 1 − ``ratio`` quantile).
* merged = base + Σ_k λ_k s_k sign(τ_k) A_k / Σ_j s_j, linear in λ.

One expert alone is not restored: the top ``ratio`` of its entries survives, clipped. An expert
whose magnitudes or scores are all the same competes for nothing (the authors' code divides 0 by 0).
The authors sort the whole model; here ranks are selected exactly from histograms, in reads of the
model tensor by tensor. Scores are compared in fp32, after a division of the intra-balancing by
exp(K), which s_k does not see and which would overflow for many experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import Fractional
from mergesearch.merging.operators.parts.magnitudes import (
    Histogram,
    Stream,
    kth_largest,
    magnitude_histogram,
)
from mergesearch.merging.operators.parts.task_vectors import task_vectors, vector_label
from mergesearch.merging.tensors.place import Place, place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

    #: Reads the model once: the scores of all experts, tensor by tensor.
    Scores = Callable[[], Iterable[Sequence[torch.Tensor]]]

#: Which of the authors' three scripts defines the inter-balancing.
Variant = Literal["vision", "evolution", "language"]

#: Least and greatest of a row of numbers, after clipping.
Range = tuple[float, float]

#: Keys of fp32 scores are counted by their upper and then by their lower 16 bits.
_BINS = 1 << 16
#: Scores counted at a time.
_BLOCK = 1 << 20


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    variant: Annotated[
        Variant, Field(description="inter-balancing, as in one of the authors' three scripts")
    ] = "vision",
    ratio: Annotated[
        Fractional, Field(description="fraction of entries whose score stays above 0")
    ] = 0.05,
    clip: Annotated[
        float,
        Field(ge=0, lt=0.5, description="magnitudes are clipped to this quantile and its opposite"),
    ] = 0.01,
) -> Basis:
    """Clipped task vectors times their share of the balanced scores."""
    magnitudes = [_magnitude_range(base, expert, clip) for expert in experts]

    def scored(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        vectors = task_vectors(base, experts, name)
        return vectors, _scores(vectors, magnitudes, variant)

    def all_scores() -> Iterator[list[torch.Tensor]]:
        return (scored(name)[1] for name in base.names)

    ranges = _score_ranges(all_scores, [base, *experts], [variant, clip], ratio)

    def rows(name: str) -> list[torch.Tensor]:
        vectors, scores = scored(name)
        shares = [_relative(score, limits) for score, limits in zip(scores, ranges, strict=True)]
        # s_k sign(τ_k) A_k / Σ_j s_j
        total = _sum(shares)
        total = total.masked_fill(total == 0, 1.0)
        clipped = (
            vector.sign() * vector.abs().clamp(*limits)
            for vector, limits in zip(vectors, magnitudes, strict=True)
        )
        return [
            vector * (share / total).to(vector.dtype)
            for vector, share in zip(clipped, shares, strict=True)
        ]

    return Basis("delta", len(experts), rows)


def _magnitude_range(base: TensorSource, expert: TensorSource, clip: float) -> Range:
    """The quantiles to which |τ| of one expert is clipped, over the whole model.

    Raises:
        CheckpointError: If the task vector holds NaN or infinity.
    """
    import torch

    def changes() -> Iterable[tuple[str, torch.Tensor]]:
        return (
            (vector_label(expert, name), task_vectors(base, [expert], name)[0])
            for name in base.names
        )

    def select() -> dict[str, torch.Tensor]:
        place = place_of(base)
        counts = remembered(
            [base, expert],
            ["all magnitudes"],
            lambda: magnitude_histogram(changes, place=place).to_tensors(),
        )
        return {
            "range": torch.tensor(
                _clipping(changes, Histogram.from_tensors(counts), clip, place), dtype=torch.float64
            )
        }

    low, high = remembered([base, expert], ["pcb magnitudes", clip], select)["range"].tolist()
    return low, high


def _clipping(stream: Stream, first: Histogram, clip: float, place: Place) -> Range:
    """The sorted magnitudes at the indices ``⌊n clip⌋`` and ``⌊n (1 − clip) − 1⌋``."""
    count = first.total
    if count == 0:
        return 0.0, 0.0
    low = int(count * clip)
    high = max(low, int(count * (1 - clip) - 1))
    least = kth_largest(stream, count - low, first=first, place=place)
    return least, kth_largest(stream, count - high, first=first, place=place)


def _scores(
    vectors: Sequence[torch.Tensor], magnitudes: Sequence[Range], variant: Variant
) -> list[torch.Tensor]:
    """``b_k / exp(K)`` of one tensor for every expert, in fp32."""
    sizes = [
        _relative(vector.abs(), limits) for vector, limits in zip(vectors, magnitudes, strict=True)
    ]
    count = len(vectors)
    # intra_k / exp(K) = exp(K (n(A_k)² − 1))
    intra = ((size.square() - 1).mul_(count).exp_() for size in sizes)
    # b_k = intra_k · inter_k
    inter = _inter_balancing(vectors, sizes, variant)
    return [(one * other).float() for one, other in zip(intra, inter, strict=True)]


def _inter_balancing(
    vectors: Sequence[torch.Tensor], sizes: Sequence[torch.Tensor], variant: Variant
) -> Iterator[torch.Tensor]:
    """How far each vector agrees with all of them, one result at a time.

    Args:
        vectors: K tensors τ_k.
        sizes: K tensors n(A_k).
        variant: Which of the three formulas.
    """
    if variant == "language":
        total = _sum(vectors)
        return ((vector * total).tanh_() for vector in vectors)  # tanh(τ_k Σ_j τ_j)
    signed = [vector.sign().mul_(size) for vector, size in zip(vectors, sizes, strict=True)]
    if variant == "evolution":  # Σ_j tanh(sign(τ_k) n(A_k) sign(τ_j) n(A_j))
        return (_sum((one * other).tanh_() for other in signed) for one in signed)
    total = _sum(signed)
    return ((vector * total).tanh_() for vector in vectors)  # tanh(τ_k Σ_j sign(τ_j) n(A_j))


def _relative(numbers: torch.Tensor, limits: Range) -> torch.Tensor:
    """``n(x) = (x − min) / (max − min)`` of numbers clipped to a range; 0 if it is empty."""
    import torch

    low, high = limits
    if high <= low:
        return torch.zeros_like(numbers)
    return numbers.clamp(low, high).sub_(low).div_(high - low)


def _score_ranges(
    scores: Scores, sources: Sequence[TensorSource], key: Sequence[Any], ratio: float
) -> list[Range]:
    """For every expert the 1 − ``ratio`` quantile and the maximum of its scores in the model."""

    def read() -> dict[str, torch.Tensor]:
        return _upper_counts(scores(), len(sources) - 1)

    def select() -> dict[str, torch.Tensor]:
        return {
            "ranges": _quantiles(scores(), remembered(sources, ["pcb scores", *key], read), ratio)
        }

    return [
        (low, high)
        for low, high in remembered(sources, ["pcb ranges", *key, ratio], select)["ranges"].tolist()
    ]


def _upper_counts(
    scores: Iterable[Sequence[torch.Tensor]], experts: int
) -> dict[str, torch.Tensor]:
    """First read: ``counts`` of the upper halves of keys, and the ``largest`` scores.

    They are ``(K, 65536)`` and ``(K,)``.
    """
    import torch

    counts = torch.zeros(experts, _BINS, dtype=torch.int64)
    largest = torch.full((experts,), -torch.inf, dtype=torch.float64)
    for k, part in _parts(scores):
        largest[k] = max(float(largest[k]), float(part.max()))
        counts[k] += _count((_keys(part) >> 16) + _BINS // 2)
    return {"counts": counts, "largest": largest}


def _quantiles(
    scores: Iterable[Sequence[torch.Tensor]], first: Mapping[str, torch.Tensor], ratio: float
) -> torch.Tensor:
    """Second read: the sorted scores at index ``⌊n (1 − ratio)⌋`` and the last, ``(K, 2)``."""
    import torch

    counts = first["counts"]
    sizes = [int(size) for size in counts.sum(dim=1)]
    indices = [min(int(size * (1 - ratio)), size - 1) for size in sizes]
    uppers = [_bin_at(row, index) for row, index in zip(counts, indices, strict=True)]
    inside = torch.zeros_like(counts)
    for k, part in _parts(scores):
        keys = _keys(part)
        inside[k] += _count(keys[(keys >> 16) + _BINS // 2 == uppers[k][0]] & (_BINS - 1))
    lowers = [_bin_at(row, index)[0] for row, (_, index) in zip(inside, uppers, strict=True)]
    keys = torch.tensor(
        [(one - _BINS // 2) << 16 | two for (one, _), two in zip(uppers, lowers, strict=True)]
    )
    lowest = _numbers(keys.int()).double()
    return torch.stack([lowest, first["largest"]], dim=1)


def _parts(scores: Iterable[Sequence[torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of the expert and a block of its scores; none is empty."""
    import torch

    for tensors in scores:
        for k, tensor in enumerate(tensors):
            yield from (
                (k, part) for part in torch.split(tensor.reshape(-1), _BLOCK) if part.numel()
            )


def _keys(numbers: torch.Tensor) -> torch.Tensor:
    """fp32 -> int32 in the same order: the bits, those of negative magnitudes inverted."""
    import torch

    bits = numbers.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_keys`, which is its own inverse but for dtypes."""
    import torch

    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _count(bins: torch.Tensor) -> torch.Tensor:
    """How many numbers fall into each bin, ``(65536,)``."""
    import torch

    return torch.bincount(bins.reshape(-1).long(), minlength=_BINS).cpu()


def _bin_at(counts: torch.Tensor, index: int) -> tuple[int, int]:
    """The bin of the number at ``index`` of the sorted numbers, and its index inside the bin."""
    import torch

    below = counts.cumsum(0)
    bin_index = int(torch.searchsorted(below, index, right=True))
    return bin_index, index - int(below[bin_index] - counts[bin_index])


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(operator.add, tensors)


PCB = Operator(
    name="pcb",
    prepare=prepare,
    summary="entries weighted by how they compete within and across experts",
    paper="Du 2024, Parameter competition balancing for model merging",
    family="sparse",
    scope="G",
    identities=frozenset({"base_at_zero", "permutation", "linearity"}),
    default=lambda _experts, _options: 1.2,
    bounds=lambda _experts, _options: (0.3, 2.0),
    copies=lambda experts: 4 * experts + 4,
    when="with one coefficient for each expert, and a search over them",
)
