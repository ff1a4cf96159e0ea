"""DARE: drop elements of task vectors at random and rescale the survivors.

Yu 2024, "Language models are super Mario: absorbing abilities from homologous models as a free
lunch": δ = m ⊙ τ / (1 − p) with m ~ Bernoulli(1 − p) for every element. The thinned task vectors
are added up (``dare``), or a sign is elected at every position as in TIES (``dare_ties``).

As in the paper, survivors are divided by the probability of survival, which keeps every element
right on average; tools that match the L1 norm of the tensor instead are reproduced by
``rescale="l1"``. The default drop rate p is the paper's for language models, 0.9, which needs small
task vectors (below about 0.002); vision models need about 0.5.

``density`` trims what is left, as the authors' code does where DARE comes before TIES: of all
elements of the model that may be dropped, dropped ones included, the fraction with the largest
magnitudes is kept. So it has an effect only below 1 − p; 1 is off.

Unlike in popular code, norms, biases and scalars are not thinned unless asked (one in ten of a
norm's few elements, ten times as large, is noise). Masks depend on the seed and on names alone, not
on a generator whose state depends on the order of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mergesearch.merging.kernels.forms import KEEP_ALL, Thinning
from mergesearch.merging.operators.base import Basis, Direct, Operator
from mergesearch.merging.operators.parts.election import (
    SHARED_IDENTITIES,
    Fractional,
    Merge,
    Mode,
    Seed,
    Thinnings,
    elected_basis,
    is_exempt,
    merging_of,
    one_minus,
    refuse_election,
    thinned_sum,
)
from mergesearch.merging.operators.parts.magnitudes import count_kept, kth_largest, trim
from mergesearch.merging.operators.parts.masks import chance_of, keep_mask, mask_key
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors, vector_label
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import Options, TensorSource, remembered

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators.parts.election import Vectors

Drop = Annotated[
    float, Field(ge=0, lt=1, description="probability with which an element is dropped")
]
Rescale = Annotated[
    Literal["inverse_prob", "l1", "l2", "none"],
    Field(
        description="survivors are divided by their probability, or scaled to the tensor's norm "
        "before dropping"
    ),
]
#: Elements rescaled at a time: what it takes besides the vector stays small.
BLOCK = 1 << 18

Thinned = Annotated[Literal["pass", "drop"], Field(description="whether 1-D tensors are thinned")]
Trimmed = Annotated[
    Fractional,
    Field(
        description="fraction of the elements of the model that trimming keeps after dropping; 1 "
        "does not trim"
    ),
]


@dataclass(frozen=True)
class _Dropping:
    """How elements are dropped: hyperparameters of the same names."""

    drop: float
    rescale: str
    seed: int
    vectors: str


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    drop: Drop = 0.9,
    rescale: Rescale = "inverse_prob",
    seed: Seed = 0,
    vectors: Thinned = "pass",
    density: Trimmed = 1.0,
) -> Basis:
    """Task vectors with elements dropped at random, the survivors rescaled."""
    dropping = _Dropping(drop, rescale, seed, vectors)
    limits = _limits(base, experts, dropping, density)
    thin = trimmed(base, experts, dropping, limits)
    thinnings = _thinnings(base, experts, dropping, limits)
    return Basis(
        "delta",
        len(experts),
        thin,
        direct=merging_of(thin) if thinnings is None else partial(_merge_stored, thinnings),
    )


def prepare_elected(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    drop: Drop = 0.9,
    rescale: Rescale = "inverse_prob",
    merge: Merge = "mean",
    mode: Mode = "frozen",
    seed: Seed = 0,
    vectors: Thinned = "pass",
    density: Trimmed = 1.0,
) -> Basis:
    """Thinned task vectors, each reduced to where it has the elected sign."""
    dropping = _Dropping(drop, rescale, seed, vectors)
    limits = _limits(base, experts, dropping, density)
    thin = trimmed(base, experts, dropping, limits)
    names = [expert.name for expert in experts]
    trim = [] if density >= 1 else [density]
    key = ["dare", drop, rescale, seed, vectors, names, *trim]
    thinnings = _thinnings(base, experts, dropping, limits)
    return elected_basis(base, experts, thin, merge, mode, key, thinnings)


def _merge_stored(
    thinnings: Thinnings,
    name: str,
    numbers: Sequence[Any],
    weights: Any,
    boundaries: Any,
    out: Any,
    _later: bool,
) -> Direct | None:
    """Thin and add a tensor's task vectors from its stored numbers, as ``Basis.direct`` has it."""
    return thinned_sum(numbers, thinnings(name), weights, boundaries, out)


def dropped(
    base: TensorSource,
    experts: Sequence[TensorSource],
    drop: float,
    rescale: str = "inverse_prob",
    seed: int = 0,
    vectors: str = "pass",
) -> Vectors:
    """Tensor name -> task vectors with elements dropped at random."""
    keep = one_minus(drop)

    def thin(name: str) -> list[torch.Tensor]:
        task = finite_task_vectors(base, experts, name)
        if is_exempt(base.shape(name), vectors):
            return task
        return [
            survivors(vector, seed, expert.name, name, keep, rescale)
            for expert, vector in zip(experts, task, strict=True)
        ]

    return thin


def _limits(
    base: TensorSource, experts: Sequence[TensorSource], dropping: _Dropping, density: float
) -> list[float]:
    """For every expert, the magnitude from which on survivors are kept; 0 keeps all."""
    if density >= 1:
        return [0.0] * len(experts)
    return [_threshold(base, expert, dropping, density) for expert in experts]


def _thinnings(
    base: TensorSource,
    experts: Sequence[TensorSource],
    dropping: _Dropping,
    limits: Sequence[float],
) -> Thinnings | None:
    """What dropping and trimming do, for compiled kernels; None where a norm has to be known."""
    if dropping.rescale not in ("inverse_prob", "none"):
        return None
    keep = one_minus(dropping.drop)
    chance = chance_of(keep)
    factor = 1 / keep if dropping.rescale == "inverse_prob" else 1.0

    def thinnings(name: str) -> list[Thinning]:
        if is_exempt(base.shape(name), dropping.vectors):
            return [KEEP_ALL] * len(experts)
        if chance >= 1 << 32:
            return [Thinning(limit) for limit in limits]
        return [
            Thinning(limit, mask_key(dropping.seed, expert.name, name), chance, factor)
            for expert, limit in zip(experts, limits, strict=True)
        ]

    return thinnings


def trimmed(
    base: TensorSource,
    experts: Sequence[TensorSource],
    dropping: _Dropping,
    limits: Sequence[float],
) -> Vectors:
    """Tensor name -> thinned task vectors, without what is below the limits."""
    thin = dropped(base, experts, *astuple(dropping))
    if not any(limits):
        return thin

    def trim_all(name: str) -> list[torch.Tensor]:
        vectors = thin(name)
        if is_exempt(base.shape(name), dropping.vectors):
            return vectors
        return [
            trim(vector, limit) if limit > 0 else vector
            for vector, limit in zip(vectors, limits, strict=True)
        ]

    return trim_all


def _threshold(
    base: TensorSource, expert: TensorSource, dropping: _Dropping, density: float
) -> float:
    """Magnitude from which on survivors of one expert are kept; 0 keeps all."""
    thin = dropped(base, [expert], *astuple(dropping))
    names = [
        name
        for name in base.names
        if not is_exempt(base.shape(name), dropping.vectors) and 0 not in base.shape(name)
    ]
    total = sum(math.prod(base.shape(name)) for name in names)

    def survivors_of_model() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield vector_label(expert, name), thin(name)[0]

    def compute() -> dict[str, torch.Tensor]:
        import torch

        rank = count_kept(density, total)
        limit = kth_largest(survivors_of_model, rank, place=place_of(base)) if names else 0.0
        return {"limit": torch.tensor([limit], dtype=torch.float64)}

    key = ["threshold of survivors", density, *astuple(dropping), expert.name]
    return float(remembered([base, expert], key, compute)["limit"])


def survivors(
    vector: torch.Tensor,
    seed: int,
    expert: str,
    name: str,
    keep: float | torch.Tensor,
    rescale: str,
) -> torch.Tensor:
    """A task vector with elements kept by chance and rescaled; ``vector`` is overwritten.

    Args:
        vector: Task vector of one tensor.
        seed: Chooses the mask.
        expert: Name of the expert, which the mask goes by.
        name: Name of the tensor, which the mask goes by.
        keep: Probability of survival, for all elements or (fp64) for each; not 0.
        rescale: ``inverse_prob``, ``l1``, ``l2`` or ``none``.
    """
    before = norm_to_keep(vector, rescale)
    # δ = m ⊙ τ / (1 − p), m ~ Bernoulli(1 − p)
    mask = keep_mask(seed, expert, name, vector.shape, keep)
    vector.masked_fill_(~mask.to(vector.device), 0.0)
    if rescale == "inverse_prob":
        return _divided(vector, keep)
    return with_norm(vector, before, rescale)


def with_norm(vector: torch.Tensor, norm: float, rescale: str) -> torch.Tensor:
    """What is left of a vector, in place, scaled to the norm that it had before dropping."""
    # δ = m ⊙ τ · ‖τ‖ / ‖m ⊙ τ‖
    after = norm_to_keep(vector, rescale)
    return vector.mul_(norm / after) if after > 0 else vector


def _divided(vector: torch.Tensor, keep: float | torch.Tensor) -> torch.Tensor:
    """``vector / keep``, overwriting ``vector``.

    It is a product with the rounded inverse, so that equal probabilities give equal bits.
    """
    if isinstance(keep, float):
        return vector.mul_(1 / keep)
    vector = vector.contiguous()
    flat = vector.view(-1)
    inverse = keep.reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        flat[start : start + BLOCK] *= (1 / inverse[start : start + BLOCK]).to(flat)
    return vector


def norm_to_keep(vector: torch.Tensor, rescale: str) -> float:
    """The norm that rescaling restores, in fp64; 1 where it restores none."""
    if rescale not in ("l1", "l2"):
        return 1.0
    # numpy, because the order of torch's sum, and so its bits, depends on the number of threads
    flat = vector.detach().cpu().reshape(-1).numpy()
    blocks = (
        flat[start : start + BLOCK].astype(np.float64) for start in range(0, flat.size, BLOCK)
    )
    if rescale == "l1":
        return math.fsum(float(np.abs(block).sum()) for block in blocks)
    return math.sqrt(math.fsum(float(np.square(block).sum()) for block in blocks))


def elected_default(_experts: int, options: Options) -> float:
    """1 for means, as for TIES; 0.5 for sums."""
    return 0.5 if options["merge"] == "sum" else 1.0


def _kept(options: Options) -> float:
    """The share of elements that a row keeps at most."""
    return min(one_minus(options["drop"]), float(options["density"]))


# Survivors are 1 / (1 − p) times as large: amplifying them further is noise.
BOUNDS = (0.0, 1.2)

DARE = Operator(
    name="dare",
    prepare=prepare,
    summary="drop elements of task vectors at random, rescale the survivors, add them up",
    paper="Yu 2024, Language models are super Mario",
    family="sparse",
    scope="T",
    identities=SHARED_IDENTITIES,
    default=lambda _experts, _options: 0.3,
    bounds=lambda _experts, _options: BOUNDS,
    plain={"drop": 0.0},
    plain_identities=SHARED_IDENTITIES | {"expert_near_one_hot", "single_expert"},
    copies=lambda experts: experts + 5,
    stochastic=True,
    row_form=lambda _options: "masked",
    density=_kept,
    when="for language models whose task vectors are small, to make room for more of them",
)

DARE_TIES = Operator(
    name="dare_ties",
    prepare=prepare_elected,
    summary="drop elements of task vectors at random, elect a sign at every position, merge what "
    "agrees with it",
    paper="Yu 2024, Language models are super Mario",
    family="sparse",
    scope="G",
    identities=SHARED_IDENTITIES,
    default=elected_default,
    bounds=lambda _experts, _options: BOUNDS,
    plain={"drop": 0.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "identical_experts"},
    refuse=refuse_election,
    copies=lambda experts: experts + 5,
    stochastic=True,
    row_form=lambda _options: "masked",
    density=_kept,
    when="as `dare`, where the signs of what survives disagree",
)
