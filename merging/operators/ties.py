"""TIES: trim small changes, elect a sign at every position, merge what agrees with it.

Yadav 2023, "TIES-Merging: resolving interference when merging models", in three steps:

1. Trim: every task vector keeps the ``density`` of its elements with the largest magnitudes.
2. Elect: γ = sign(Σ_k τ̂_k) at every position, with τ̂_k the trimmed task vectors.
3. Disjoint merge: the mean (or sum, or largest) of the τ̂_k whose sign is γ.

As in the authors' code there is one threshold for the whole model (other tools trim every tensor by
itself: ``scope="tensor"``), signs are elected on unweighted trimmed vectors, and the majority of
all positions decides cancellations. Unlike there, r = ceil(density · n) elements are kept rather
than one more, with the ties of the last one; ``density`` is a fraction and never a percentage;
scalars (0-d) are not trimmed. Electing after weighting, as other tools do, makes the merge jump as
coefficients move: ``mode="live"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.kernels.forms import Thinning
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import (
    SHARED_IDENTITIES,
    Fractional,
    Limits,
    Merge,
    Mode,
    elected_basis,
    is_exempt,
    refuse_election,
)
from mergesearch.merging.operators.parts.magnitudes import (
    Histogram,
    Stream,
    count_kept,
    kth_largest,
    magnitude_histogram,
    trim,
)
from mergesearch.merging.operators.parts.stored_ranks import stored_thresholds
from mergesearch.merging.operators.parts.task_vectors import (
    difference,
    finite_task_vectors,
    task_vectors,
    vector_label,
)
from mergesearch.merging.tensors.parallel import nested_parallel_map
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.roles import roles_of
from mergesearch.merging.tensors.source import Options, TensorSource, remembered

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators.parts.election import Vectors

#: Among which elements of a task vector magnitudes are ranked: those of the whole model, of one
#: tensor, or of all tensors of one kind of module.
TrimScope = Literal["model", "tensor", "module"]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Annotated[
        Fractional, Field(description="fraction of elements that trimming keeps")
    ] = 0.2,
    scope: Annotated[
        TrimScope,
        Field(
            description="among which elements magnitudes are ranked; module: attention, mlp, norm, "
            "..."
        ),
    ] = "model",
    merge: Merge = "mean",
    mode: Mode = "frozen",
    vectors: Annotated[
        Literal["trim", "pass"], Field(description="whether 1-D tensors are trimmed")
    ] = "trim",
) -> Basis:
    """Trimmed task vectors, each reduced to where it has the elected sign."""
    limits = trimming_limits(base, experts, density, scope, vectors)
    thin = trimmed(base, experts, limits)

    def thinnings(name: str) -> list[Thinning]:
        return [Thinning(limit) for limit in limits(name)]

    key = ["ties", density, scope, vectors]
    return elected_basis(base, experts, thin, merge, mode, key, thinnings)


def trimmed(base: TensorSource, experts: Sequence[TensorSource], limits: Limits) -> Vectors:
    """Step 1, trim: tensor name -> τ̂_k, the largest magnitudes of τ_k and 0 elsewhere.

    Raises:
        CheckpointError: If a task vector holds NaN or infinity.
    """

    def thin(name: str) -> list[torch.Tensor]:
        task = finite_task_vectors(base, experts, name)
        return [
            trim(vector, limit) if limit > 0 else vector
            for vector, limit in zip(task, limits(name), strict=True)
        ]

    return thin


def trimming_limits(
    base: TensorSource,
    experts: Sequence[TensorSource],
    density: float,
    scope: TrimScope = "model",
    vectors: Literal["trim", "pass"] = "trim",
) -> Limits:
    """Tensor name -> the magnitude from which on each expert's elements are kept; 0 keeps all.

    Unless the scope is ``tensor``, the thresholds are worked out here, in one or two reads of every
    expert and the base.
    """
    whole: Sequence[Mapping[str, float]] = []
    if scope != "tensor" and density < 1:
        whole = _counted_thresholds(base, experts, density, scope, vectors) or list(
            nested_parallel_map(
                lambda expert: thresholds(base, expert, density, scope, vectors), experts
            )
        )
    own: dict[str, list[float]] = {}
    group_of = _group_of(base, scope)

    def limits(name: str) -> list[float]:
        shape = base.shape(name)
        if density >= 1 or is_exempt(shape, vectors) or 0 in shape:
            return [0.0] * len(experts)
        if scope != "tensor":
            return [limit.get(group_of[name], 0.0) for limit in whole]
        if name not in own:  # elections ask for a tensor twice
            own[name] = stored_thresholds(base, experts, [name], density) or [
                _threshold_of(base, expert, name, density) for expert in experts
            ]
        return own[name]

    return limits


def _counted_thresholds(
    base: TensorSource,
    experts: Sequence[TensorSource],
    density: float,
    scope: TrimScope,
    vectors: str,
) -> list[dict[str, float]] | None:
    """:func:`thresholds` of all experts from one read of their stored numbers.

    None where these cannot be read so, or where a memo keeps what each expert gives.
    """
    if base.memo is not None:
        return None
    limits: list[dict[str, float]] = [{} for _ in experts]
    for group, names in _groups(base, scope, vectors).items():
        found = stored_thresholds(base, experts, names, density)
        if found is None:
            return None
        for own, limit in zip(limits, found, strict=True):
            own[group] = limit
    return limits


def _threshold_of(base: TensorSource, expert: TensorSource, name: str, density: float) -> float:
    """The magnitude from which on elements of one tensor are kept."""
    (vector,) = task_vectors(base, [expert], name)
    return kth_largest(
        lambda: [(vector_label(expert, name), vector)], count_kept(density, vector.numel())
    )


def thresholds(
    base: TensorSource,
    expert: TensorSource,
    density: float,
    scope: TrimScope = "model",
    vectors: str = "trim",
) -> dict[str, float]:
    """Group of tensors -> the r-th largest magnitude of one expert, the least that it keeps.

    The group is ``model``, or the module for the scope ``module``.
    """
    import torch

    def compute() -> dict[str, torch.Tensor]:
        limits = {}
        for group, names in _groups(base, scope, vectors).items():
            stream = _changes(base, expert, names)
            first = _first_read(base, expert, [scope, vectors, group], stream)
            rank = count_kept(density, first.total)
            limits[group] = torch.tensor(
                [kth_largest(stream, rank, first=first, place=place_of(base))], dtype=torch.float64
            )
        return limits

    thresholds_of_groups = remembered(
        [base, expert], ["thresholds", density, scope, vectors], compute
    )
    return {group: float(limit) for group, limit in thresholds_of_groups.items()}


def _first_read(
    base: TensorSource, expert: TensorSource, key: Sequence[str], stream: Stream
) -> Histogram:
    """The histogram of a group, which serves every density."""
    counts = remembered(
        [base, expert],
        ["magnitudes", *key],
        lambda: magnitude_histogram(stream, place=place_of(base)).to_tensors(),
    )
    return Histogram.from_tensors(counts)


def _changes(base: TensorSource, expert: TensorSource, names: Sequence[str]) -> Stream:
    return lambda: (
        (vector_label(expert, name), difference(expert.read(name), base.read(name)))
        for name in names
    )


def _groups(base: TensorSource, scope: TrimScope, vectors: str) -> dict[str, list[str]]:
    """Group -> names of the tensors that are ranked together; none is empty."""
    groups: dict[str, list[str]] = {}
    group_of = _group_of(base, scope)
    for name in base.names:
        shape = base.shape(name)
        if not is_exempt(shape, vectors) and 0 not in shape:
            groups.setdefault(group_of[name], []).append(name)
    return groups


def _group_of(base: TensorSource, scope: TrimScope) -> dict[str, str]:
    if scope != "module":
        return dict.fromkeys(base.names, "model")
    return {name: role.module for name, role in roles_of(base.names).items()}


def election_default(_experts: int, options: Options) -> float:
    """1 for means; the sum of up to K agreeing terms is scaled as in task arithmetic."""
    return 0.3 if options["merge"] == "sum" else 1.0


def election_bounds(_experts: int, options: Options) -> tuple[float, float]:
    """The range in which reference grids search."""
    return (0.0, 1.0) if options["merge"] == "sum" else (0.0, 1.6)


TIES = Operator(
    name="ties",
    prepare=prepare,
    summary="trim small changes, elect a sign at every position, merge what agrees with it",
    paper="Yadav 2023, TIES-Merging: resolving interference when merging models",
    family="sparse",
    scope="G",
    identities=SHARED_IDENTITIES,
    default=election_default,
    bounds=election_bounds,
    plain={"density": 1.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "identical_experts"},
    refuse=refuse_election,
    copies=lambda experts: experts + 6,
    row_form=lambda _options: "masked",
    density=lambda options: float(options["density"]),
    when="where many experts disagree in sign and most of their changes are small",
)
