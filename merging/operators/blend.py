"""The results of several operators side by side, so that a search goes on where the best ended.

The first member leads. Its K rows come first, so that each expert keeps its coefficients. Every
other member j has one row, the way from the leader's merge to its own, with one coefficient d for
all experts of a member:

* row_j = d_j · Σ_k T_jk(τ_k) − d_1 · Σ_k T_1k(τ_k)

With coefficients d_1 for the leader's rows and weights w_j for the others, the merge is base +
(1 − Σ_j w_j) · (leader's change) + Σ_j w_j · (change of j): an interpolation between the members'
merges, of which 0 is the leader's, bit for bit.

The idea of a weighted sum of finished merges is that of model soups (Wortsman 2022), with merges in
the place of fine-tuned models. One coefficient for all directions has no meaning, so that the
default is 0, the base. ``operator: auto`` in a study chooses the members by measuring them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.models.calibration_spec import CalibrationOption
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Members where none are named: two that need nothing but weights.
MEMBERS = ["task_arithmetic", "ties"]


def member_options(operator: Operator, calibration: Any) -> dict[str, Any]:
    """The hyperparameters of a member: its defaults, with the calibration if it takes one."""
    if calibration is None or "calibration" not in operator.hyperparameters:
        return operator.complete({})
    return operator.complete({"calibration": calibration})


def blend_of(operators: Mapping[str, Operator]) -> Operator:
    """The operator whose members are among ``operators``."""

    def members_of(options: Options) -> list[Operator]:
        """The members, the leader first."""
        unknown = sorted(name for name in options["members"] if name not in operators)
        if unknown:
            raise RecipeError(
                f"operator blend: hyperparameter 'members': expected names among "
                f"{sorted(operators)}, received {unknown[0]!r}"
            )
        return [operators[name] for name in options["members"]]

    def prepare(
        base: TensorSource,
        experts: Sequence[TensorSource],
        *,
        members: Annotated[
            list[str], Field(min_length=1, description="operators by name, the leader first")
        ] = MEMBERS,
        scales: Annotated[
            list[float],
            Field(description="coefficient of each member; empty: the defaults of the members"),
        ] = [],  # noqa: B006  # read only
        calibration: Annotated[
            CalibrationOption | None,
            Field(description="items for the members that run the experts on some"),
        ] = None,
    ) -> Basis:
        """The rows of the leader, and the way from its merge to that of every other member."""
        bases = []
        defaults = []
        for operator in members_of({"members": members}):
            options = member_options(operator, calibration)
            bases.append(operator.prepare(base, experts, **options))
            defaults.append(operator.default(len(experts), options))
            _check_form(operator, bases[-1])
        return _side_by_side(bases, scales or defaults)

    def directions(experts: int, options: Options) -> int:
        leader, *others = members_of(options)
        own = member_options(leader, options["calibration"])
        return leader.directions(experts, own) + len(others)

    def refuse(layout: Layout, experts: int, options: Options) -> str | None:
        given = options["scales"]
        if given and len(given) != len(options["members"]):
            return (
                f"hyperparameter 'scales': expected one for each of "
                f"{len(options['members'])} members, received {len(given)}"
            )
        for operator in members_of(options):
            try:
                operator.check(layout, experts, member_options(operator, options["calibration"]))
            except RecipeError as error:
                return str(error)
        return None

    identities = frozenset(
        {
            "base_at_zero",
            "permutation",
            "linearity",
            "homogeneity",
            "default_ignores_zero_vector",
        }
    )
    return Operator(
        name="blend",
        prepare=prepare,
        summary="the rows of one operator, and the ways from its merge to those of others, for a "
        "search between finished merges",
        paper="Wortsman 2022, Model soups: averaging weights of multiple fine-tuned models "
        "improves accuracy without increasing inference time",
        family="linear",
        scope="S",
        identities=identities,
        default=lambda _experts, _options: 0.0,
        bounds=lambda _experts, _options: (0.0, 1.0),
        directions=directions,
        plain={"members": ["task_arithmetic"]},
        plain_identities=identities | {"expert_near_one_hot", "zero_vector"},
        # One expert leaves nothing to choose between.
        experts=(2, None),
        refuse=refuse,
        # Members are prepared one after the other, and a tensor's rows are held for all of them.
        copies=lambda experts: 20 * experts + 40,
        by_name=True,
        when="after several operators were measured, to go on between their merges, as "
        "`operator: auto` does",
    )


def _side_by_side(bases: Sequence[Basis], scales: Sequence[float]) -> Basis:
    """One basis of several, each merged with a coefficient."""
    leader, *others = bases
    own_scale, *other_scales = scales

    def rows(name: str) -> list[torch.Tensor]:
        own = leader.rows(name)
        origin = _merge(own, own_scale)
        ways = [
            _merge(basis.rows(name), scale).sub_(origin)
            for basis, scale in zip(others, other_scales, strict=True)
        ]
        return [*own, *ways]

    return Basis("delta", leader.directions + len(others), rows)


def _merge(rows: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """``scale · Σ_k row_k`` as a new tensor."""
    total = rows[0] * scale
    for row in rows[1:]:
        total.add_(row, alpha=scale)
    return total


def _check_form(operator: Operator, basis: Basis) -> None:
    if basis.form != "delta":
        raise RecipeError(
            f"operator blend: hyperparameter 'members': expected operators whose rows are added to "
            f"the base, received {operator.name}, whose form is {basis.form}; leave it out"
        )
