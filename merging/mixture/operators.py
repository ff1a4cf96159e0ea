"""Ways to give a mixture fewer experts, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergesearch.merging.mixture.grouping import Group, around_dominant, by_outputs, most_used
from mergesearch.merging.mixture.layers import ExpertWeights
from mergesearch.merging.mixture.statistics import LayerStatistics
from mergesearch.merging.mixture.weights import (
    by_projection,
    low_rank_and_sparse,
    union_subspace_mean,
    weighted_mean,
)
from mergesearch.merging.models.calibration_spec import CalibrationOption

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class MixtureOptions(BaseModel):
    """Hyperparameters of every operator on a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    experts: Annotated[
        Count | list[Count],
        Field(description="Experts that a block keeps, for all blocks or one number for each."),
    ]
    calibration: Annotated[
        CalibrationOption, Field(description="Items to run the model on, and its auto class.")
    ]
    allocation: Annotated[
        Literal["uniform", "usage"],
        Field(
            description="`usage`: `experts` is a mean, and blocks keep those that are among the "
            "most used of the whole model."
        ),
    ] = "uniform"
    router: Annotated[
        Literal["dominant", "mean", "all"],
        Field(
            description="A group's row of the router: that of its most used expert, the mean by "
            "usage, or all rows, each with a copy of the group's weights, so that the model keeps "
            "its size."
        ),
    ] = "dominant"


class WeightedOptions(MixtureOptions):
    """Hyperparameters of operators that weight the members of a group."""

    weights: Annotated[
        list[list[Weight]] | None,
        Field(
            # Recipes without them read as they did before.
            exclude_if=lambda weights: weights is None,
            description="For every block and expert, what is added to its share in its group; the "
            "shares by usage are scaled so that all still sum to one. By default nothing.",
        ),
    ] = None


class McSmoeOptions(WeightedOptions):
    """Hyperparameters of ``mc_smoe``."""

    align: Annotated[
        bool, Field(description="Whether neurons are put in the order of the leader's first.")
    ] = True
    rank: Annotated[
        Share | None,
        Field(description="Share of the singular values that merged matrices keep; none: all."),
    ] = None
    density: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the entries that are kept beside that rank."),
    ] = 0.0


class SubMoeOptions(WeightedOptions):
    """Hyperparameters of ``sub_moe``."""

    rank: Annotated[
        Share,
        Field(
            description="Share of the group's common singular values that is kept; 1: the mean "
            "by usage."
        ),
    ] = 1.0
    align: Annotated[
        bool,
        Field(
            description="Whether neurons are put in the order of the leader's first, which the "
            "paper does not do."
        ),
    ] = False


#: Experts of a group, the leader first, and their weights, which sum to one -> the merged one.
Merge = Callable[[Sequence[ExpertWeights], Sequence[float], MixtureOptions], ExpertWeights]


@dataclass(frozen=True)
class MixtureOperator:
    """A way to give a mixture fewer experts.

    Attributes:
        name: In recipes.
        summary: What it does.
        paper: Where it comes from.
        when: When to use it.
        options: Its hyperparameters.
        group: Statistics of a block and number of groups -> groups.
        merge: Makes one expert of a group.
        aligns: Whether neurons of a group's experts are put in the order of the leader's first.
        by_outputs: Whether ``group`` needs the outputs of all experts.
        drops: Whether experts are left out that are in no group.
        changes_single: Whether a group of one is changed too.
    """

    name: str
    summary: str
    paper: str
    when: str
    options: type[MixtureOptions]
    group: Callable[[LayerStatistics, int], list[Group]]
    merge: Merge
    aligns: Callable[[MixtureOptions], bool] = lambda _options: False
    by_outputs: bool = False
    drops: bool = False
    changes_single: Callable[[MixtureOptions], bool] = lambda _options: False


def _first(
    experts: Sequence[ExpertWeights], _shares: Sequence[float], _options: MixtureOptions
) -> ExpertWeights:
    return experts[0]


def _plain_mean(
    experts: Sequence[ExpertWeights], _shares: Sequence[float], _options: MixtureOptions
) -> ExpertWeights:
    equal = [1 / len(experts)] * len(experts)
    return by_projection(lambda tensors: weighted_mean(tensors, equal), experts)


def _if_asked(options: MixtureOptions) -> bool:
    assert isinstance(options, McSmoeOptions | SubMoeOptions)
    return options.align


def _mean_by_usage(
    experts: Sequence[ExpertWeights], weights: Sequence[float], options: MixtureOptions
) -> ExpertWeights:
    assert isinstance(options, McSmoeOptions)
    mean = experts[0]
    if len(experts) > 1:
        mean = by_projection(lambda tensors: weighted_mean(tensors, weights), experts)
    rank = options.rank
    if rank is None:
        return mean
    density = options.density
    return by_projection(lambda tensors: low_rank_and_sparse(tensors[0], rank, density), [mean])


def _subspace_mean(
    experts: Sequence[ExpertWeights], weights: Sequence[float], options: MixtureOptions
) -> ExpertWeights:
    assert isinstance(options, SubMoeOptions)
    rank = options.rank
    return by_projection(lambda tensors: union_subspace_mean(tensors, weights, rank), experts)


def _compresses(options: MixtureOptions) -> bool:
    return isinstance(options, McSmoeOptions) and options.rank is not None


_ALL = (
    MixtureOperator(
        name="prune_experts",
        summary="the most used experts stay, the others are dropped",
        paper="the baseline of Li 2024, Merge, Then Compress",
        when="the line that merging has to beat; where usage is very uneven it is hard to",
        options=MixtureOptions,
        group=most_used,
        merge=_first,
        drops=True,
    ),
    MixtureOperator(
        name="reroute_experts",
        summary="the most used experts stay as they are, and what the router sends to others goes "
        "to the kept one that their logits resemble most, where a block has places for it",
        paper="the groups of Li 2024, Merge, Then Compress, without a merge",
        when="blocks keep different numbers of experts, or all rows of the router stay; with one "
        "number for all it is prune_experts",
        options=MixtureOptions,
        group=around_dominant,
        merge=_first,
    ),
    MixtureOperator(
        name="average_experts",
        summary="groups around the most used experts, averaged as they are",
        paper="the baseline of Li 2024, Merge, Then Compress",
        when="to see what alignment and usage add to mc_smoe",
        options=MixtureOptions,
        group=around_dominant,
        merge=_plain_mean,
    ),
    MixtureOperator(
        name="mc_smoe",
        summary="groups around the most used experts, neurons aligned, averaged by usage; then "
        "low rank and sparse, if that is asked for",
        paper="Li 2024, Merge, Then Compress",
        when="experts were trained from different beginnings, so that neurons do not correspond",
        options=McSmoeOptions,
        group=around_dominant,
        merge=_mean_by_usage,
        aligns=_if_asked,
        changes_single=_compresses,
    ),
    MixtureOperator(
        name="sub_moe",
        summary="clusters by what experts put out, averaged by usage in their common subspace",
        paper="Li 2025, Sub-MoE",
        when="experts were copies of one (upcycled), so that neurons correspond; running all "
        "experts on all tokens is not too much",
        options=SubMoeOptions,
        group=by_outputs,
        merge=_subspace_mean,
        aligns=_if_asked,
        by_outputs=True,
    ),
)
#: Name -> operator.
MIXTURE_OPERATORS: Mapping[str, MixtureOperator] = {operator.name: operator for operator in _ALL}


def mixture_row(operator: MixtureOperator) -> dict[str, Any]:
    """What ``mergesearch ls operators`` says about one operator on mixtures, JSON-able."""
    fields = operator.options.model_fields
    return {
        "name": operator.name,
        "family": "mixture",
        "summary": f"gives one mixture fewer experts: {operator.summary}",
        "paper": operator.paper,
        "needs": ["weights", "calibration"],
        "experts": [0, 0],
        "defaults": {
            name: "required" if field.is_required() else field.default
            for name, field in fields.items()
        },
        "coefficient": "none",
        "when": operator.when,
    }
