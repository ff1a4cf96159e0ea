"""TIES: trim small changes, elect a sign at every position, merge what agrees with it.

Yadav 2023, "TIES-Merging: resolving interference when merging models". As in the authors' code: one threshold for the
whole model (other tools trim every tensor by itself: ``scope="tensor"``), signs elected on unweighted trimmed vectors,
cancellations decided by the majority of all positions. Otherwise than there: r = ceil(density · n) elements are kept
rather than one more, with the ties of the last one; ``density`` is a fraction and never a percentage; scalars (0-d) are
not trimmed. Electing after weighting, as other tools do, makes the merge jump as coefficients move: ``mode="live"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from merging.magnitudes import Histogram, Stream, count_kept, kth_largest, magnitude_histogram, trim
from merging.memo import remembered
from merging.operators.base import Basis, Operator, Options, TensorSource
from merging.operators.sparse import (
    SHARED_IDENTITIES,
    Fractional,
    Merge,
    Mode,
    elected_basis,
    finite_task_vectors,
    is_exempt,
    refuse_election,
    what,
)
from merging.operators.task_vectors import difference
from merging.places import classify
from merging.streaming import spread

if TYPE_CHECKING:
    import torch

    from merging.operators.sparse import Vectors

Scope = Literal["model", "tensor", "module"]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Annotated[Fractional, Field(description="fraction of elements that trimming keeps")] = 0.2,
    scope: Annotated[
        Scope, Field(description="among which elements magnitudes are ranked; module: attention, mlp, norm, ...")
    ] = "model",
    merge: Merge = "mean",
    mode: Mode = "frozen",
    vectors: Annotated[Literal["trim", "pass"], Field(description="whether 1-D tensors are trimmed")] = "trim",
) -> Basis:
    """Trimmed task vectors, each reduced to where it has the elected sign."""
    thin = trimmed(base, experts, density, scope, vectors)
    return elected_basis(base, experts, thin, merge, mode, ["ties", density, scope, vectors])


def trimmed(
    base: TensorSource,
    experts: Sequence[TensorSource],
    density: float,
    scope: Scope = "model",
    vectors: Literal["trim", "pass"] = "trim",
) -> Vectors:
    """Step 1, trim: tensor name -> task vectors with their largest magnitudes kept, 0 elsewhere.

    Unless the scope is ``tensor``, the thresholds are worked out here: two reads of every expert and the base.

    Raises:
        CheckpointError: If a task vector holds NaN or infinity.
    """
    limits: list[Mapping[str, float]] = [{}] * len(experts)
    if scope != "tensor" and density < 1:
        limits = list(spread(lambda expert: thresholds(base, expert, density, scope, vectors), experts))

    own: dict[tuple[int, str], float] = {}

    def thin(name: str) -> list[torch.Tensor]:
        found = finite_task_vectors(base, experts, name)
        if density >= 1 or is_exempt(base.shape(name), vectors):
            return found
        group = _group(name, scope)
        for place, vector in enumerate(found):
            if scope == "tensor" and vector.numel():
                # Elections may ask for a tensor twice; its thresholds are worked out once.
                if (place, name) not in own:
                    own[place, name] = _threshold_of(vector, density, what(experts[place], name))
                trim(vector, own[place, name])
            elif scope != "tensor":
                trim(vector, limits[place].get(group, 0.0))
        return found

    return thin


def _threshold_of(vector: torch.Tensor, density: float, name: str) -> float:
    """The magnitude from which on elements of one tensor are kept."""
    return kth_largest(lambda: [(name, vector)], count_kept(density, vector.numel()))


def thresholds(
    base: TensorSource, expert: TensorSource, density: float, scope: Scope = "model", vectors: str = "trim"
) -> dict[str, float]:
    """Group of tensors -> the magnitude from which on one expert's elements are kept: the r-th largest of the group.

    The group is ``model``, or the module for the scope ``module``.
    """
    import torch

    def compute() -> dict[str, torch.Tensor]:
        found = {}
        for group, names in _groups(base, scope, vectors).items():
            stream = _changes(base, expert, names)
            first = _first_read(base, expert, [scope, vectors, group], stream)
            rank = count_kept(density, first.total)
            found[group] = torch.tensor([kth_largest(stream, rank, first=first)], dtype=torch.float64)
        return found

    found = remembered([base, expert], ["thresholds", density, scope, vectors], compute)
    return {group: float(limit) for group, limit in found.items()}


def _first_read(base: TensorSource, expert: TensorSource, key: Sequence[str], stream: Stream) -> Histogram:
    """The histogram of a group, which serves every density."""
    counts = remembered([base, expert], ["magnitudes", *key], lambda: magnitude_histogram(stream).to_tensors())
    return Histogram.from_tensors(counts)


def _changes(base: TensorSource, expert: TensorSource, names: Sequence[str]) -> Stream:
    return lambda: ((what(expert, name), difference(expert.read(name), base.read(name))) for name in names)


def _groups(base: TensorSource, scope: Scope, vectors: str) -> dict[str, list[str]]:
    """Group -> names of the tensors that are ranked together; none is empty."""
    groups: dict[str, list[str]] = {}
    for name in base.names:
        shape = base.shape(name)
        if not is_exempt(shape, vectors) and 0 not in shape:
            groups.setdefault(_group(name, scope), []).append(name)
    return groups


def _group(name: str, scope: Scope) -> str:
    return classify(name).module if scope == "module" else "model"


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
)
