"""DELLA: drop elements at random, large changes less often than small ones.

Deep 2024, "DELLA-Merging: reducing interference in model merging through magnitude-based sampling"
(the step called MagPrune). Elements are ranked by magnitude within their row of n, ascending, and
the probability of survival rises with the rank r from density − ε to density + ε: p_i = (density −
ε) + (r_i − 1) / (n − 1) · 2ε. As in the authors' code every survivor is divided by its own
probability, so that the thinned vector is right on average; tools that match the L1 norm of the
tensor instead are reproduced by ``rescale="l1"``. Signs are then elected (``della``), or the
thinned vectors are added up (``della_linear``). With ε = 0 this is DARE, mask for mask. Defaults
follow the authors' example: drop rate 0.3, window 2ε = 0.14.

Unlike there, norms, biases and scalars are not thinned unless asked, a row of one element
survives with probability density (the ranks' formula gives 0/0), and tensors of more than two
dimensions have rows of ``(out, in · kh · kw)``; a stack of experts has the rows of its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergesearch.merging.kernels.host import host_fp32
from mergesearch.merging.operators.base import Basis, Operator, RowForm
from mergesearch.merging.operators.dare import (
    BOUNDS,
    Rescale,
    Thinned,
    norm_to_keep,
    survivors,
    with_norm,
)
from mergesearch.merging.operators.parts.election import (
    SHARED_IDENTITIES,
    Fractional,
    Merge,
    Mode,
    Seed,
    elected_basis,
    is_exempt,
    merging_of,
    refuse_election,
)
from mergesearch.merging.operators.parts.masks import mask_key
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Options, TensorSource, shapes_of
from mergesearch.merging.tensors.stacks import stack_layouts

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators.parts.election import Vectors

Density = Annotated[Fractional, Field(description="mean probability with which an element is kept")]
Epsilon = Annotated[
    float,
    Field(
        ge=0, lt=0.5, description="the largest of a row is kept with probability density + epsilon"
    ),
]

#: Elements ranked at a time, in whole rows: ranks are 64-bit integers, several times the size of
#: the row.
BLOCK = 1 << 22


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Density = 0.7,
    epsilon: Epsilon = 0.07,
    rescale: Rescale = "inverse_prob",
    merge: Merge = "mean",
    mode: Mode = "frozen",
    seed: Seed = 0,
    vectors: Thinned = "pass",
) -> Basis:
    """Thinned task vectors, each reduced to where it has the elected sign."""
    thin = sampled(base, experts, density, epsilon, rescale, seed, vectors)
    key = ["della", density, epsilon, rescale, seed, vectors, [expert.name for expert in experts]]
    return elected_basis(base, experts, thin, merge, mode, key)


def prepare_linear(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Density = 0.7,
    epsilon: Epsilon = 0.07,
    rescale: Rescale = "inverse_prob",
    seed: Seed = 0,
    vectors: Thinned = "pass",
) -> Basis:
    """Task vectors thinned by magnitude and chance, the survivors rescaled."""
    thin = sampled(base, experts, density, epsilon, rescale, seed, vectors)
    return Basis("delta", len(experts), thin, direct=merging_of(thin))


def sampled(
    base: TensorSource,
    experts: Sequence[TensorSource],
    density: float,
    epsilon: float,
    rescale: str = "inverse_prob",
    seed: int = 0,
    vectors: str = "pass",
) -> Vectors:
    """Tensor name -> task vectors thinned by magnitude and chance."""
    stacks = stack_layouts(shapes_of(base))

    def thin_one(expert: TensorSource, name: str, vector: torch.Tensor) -> torch.Tensor:
        if epsilon == 0:
            return survivors(vector, seed, expert.name, name, density, rescale)
        matrices = vector.flatten(0, 1) if name in stacks and vector.ndim == 3 else vector
        if vector.numel() and host_fp32(vector) is not None:
            chances = keep_by_rank(_row_length(matrices), density, epsilon)
            return ranked_survivors(vector, mask_key(seed, expert.name, name), chances, rescale)
        keep = keep_probabilities(matrices, density, epsilon).view(vector.shape)
        return survivors(vector, seed, expert.name, name, keep, rescale)

    def thin(name: str) -> list[torch.Tensor]:
        task = finite_task_vectors(base, experts, name)
        if is_exempt(base.shape(name), vectors):
            return task
        return [
            thin_one(expert, name, vector) for expert, vector in zip(experts, task, strict=True)
        ]

    return thin


def ranked_survivors(
    vector: torch.Tensor, key: int, chances: torch.Tensor, rescale: str
) -> torch.Tensor:
    """A task vector with elements kept by rank and chance; the bits of :func:`.dare.survivors`.

    Args:
        vector: Contiguous fp32 in main memory; **overwritten**.
        key: Of the random bits, 128 bits.
        chances: Probability of survival of the ranks of a row, fp64.
        rescale: As for :func:`.dare.survivors`.
    """
    import torch

    from mergesearch.merging.kernels.chunks.ranking import drop_by_rank

    norm = norm_to_keep(vector, rescale)
    inverse = 1 / chances if rescale == "inverse_prob" else torch.ones_like(chances)
    limits = torch.round(chances * 2.0**32).long()
    numbers = vector.view(-1).numpy()
    drop_by_rank(numbers, len(chances), key, limits.numpy(), inverse.float().numpy())
    return vector if rescale == "inverse_prob" else with_norm(vector, norm, rescale)


def keep_by_rank(length: int, density: float, epsilon: float) -> torch.Tensor:
    """Probability of survival of the ranks r = 1..n of a row of n elements, ``(length,)``, fp64."""
    import torch

    if length == 1:
        return torch.full((1,), density, dtype=torch.float64)
    ranks = torch.arange(length, dtype=torch.float64)
    # p_i = (density − ε) + (r_i − 1) / (n − 1) · 2ε
    return ((density - epsilon) + ranks / (length - 1) * (2 * epsilon)).clamp_(max=1.0)


def _row_length(vector: torch.Tensor) -> int:
    """Elements of a row; a vector of one dimension is one row."""
    return vector[0].numel() if vector.ndim > 1 else vector.numel()


def keep_probabilities(vector: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Probability of survival of every element, rising with its rank in its row.

    ``p_i = (density − ε) + (r_i − 1) / (n − 1) · 2ε`` with ranks ``r = 1..n`` of magnitudes,
    ascending. Equal magnitudes are ranked by position.

    Args:
        vector: Any shape; rows are ``vector[i]``, a vector of one dimension is one row.
        density: Mean of the probabilities of every row.
        epsilon: Half of their range.

    Returns:
        A tensor of the same shape, fp64.
    """
    import torch

    if vector.numel() == 0:
        return torch.empty_like(vector, dtype=torch.float64)
    length = _row_length(vector)
    rows = vector.reshape(-1, length)
    ladder = keep_by_rank(length, density, epsilon).to(vector.device)
    keep = torch.empty(rows.shape, dtype=torch.float64, device=vector.device)
    height = max(1, BLOCK // length)
    for start in range(0, rows.shape[0], height):
        order = rows[start : start + height].abs().argsort(dim=1, stable=True)
        keep[start : start + height].scatter_(1, order, ladder.expand(order.shape))
    return keep.view(vector.shape)


def _refuse_range(layout: Layout, experts: int, options: Options) -> str | None:
    """Why some probability would not be one, or None."""
    density, epsilon = (Fraction(repr(float(options[name]))) for name in ("density", "epsilon"))
    if not 0 < density - epsilon <= density + epsilon <= 1:
        return (
            "expected 0 < density - epsilon and density + epsilon <= 1, received density "
            f"{options['density']} and epsilon {options['epsilon']}; take an epsilon of at most "
            f"{float(min(density, 1 - density)):.4g}"
        )
    return refuse_election(layout, experts, options) if "merge" in options else None


def _row_form(options: Options) -> RowForm:
    """Survivors that are divided by probabilities of their own are no multiple of the expert."""
    own = options["epsilon"] > 0 and options["rescale"] == "inverse_prob"
    return "dense" if own else "masked"


DELLA = Operator(
    name="della",
    prepare=prepare,
    summary="drop small changes more often than large ones, elect a sign at every position, merge "
    "what agrees with it",
    paper="Deep 2024, DELLA-Merging",
    family="sparse",
    scope="G",
    identities=SHARED_IDENTITIES,
    default=lambda _experts, options: 0.5 if options["merge"] == "sum" else 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    plain={"density": 1.0, "epsilon": 0.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "identical_experts"},
    refuse=_refuse_range,
    copies=lambda experts: experts + 8,
    stochastic=True,
    row_form=_row_form,
    density=lambda options: float(options["density"]),
    when="as `dare_ties`, where magnitudes tell which changes matter",
)

DELLA_LINEAR = Operator(
    name="della_linear",
    prepare=prepare_linear,
    summary="drop small changes more often than large ones, rescale the survivors, add them up",
    paper="Deep 2024, DELLA-Merging",
    family="sparse",
    scope="T",
    identities=SHARED_IDENTITIES,
    default=lambda _experts, _options: 0.3,
    bounds=lambda _experts, _options: BOUNDS,
    plain={"density": 1.0, "epsilon": 0.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "expert_near_one_hot"},
    refuse=_refuse_range,
    copies=lambda experts: experts + 8,
    stochastic=True,
    row_form=_row_form,
    density=lambda options: float(options["density"]),
    when="as `dare`, where magnitudes tell which changes matter",
)
