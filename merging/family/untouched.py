"""What an operator passes over: tensors that stay the base's, or are merged by a plain mean or sum.

Spectral operators follow their formula on matrices, RegMean on linear layers. All else is named by
kind, so that nobody takes most of a model for merged that is the base's. Fused projections that are
taken for one matrix, because no configuration says how they are divided, are named too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergesearch.merging.family.messages import kind_of
from mergesearch.merging.operators import members_of
from mergesearch.merging.operators.base import Operator
from mergesearch.merging.operators.parts.matrices import Selection, is_undivided, matrices_in
from mergesearch.merging.tensors.fused_heads import Config
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import shapes_of
from mergesearch.merging.tensors.stacks import stack_layouts

#: What becomes of tensors that an operator passes over.
Fate = Literal["base", "mean", "sum"]

#: Kinds that a sentence names before the rest is only counted.
_SHOWN = 4
#: Share of the parameters from which on it is said that they are merged in a plain way. What stays
#: the base's is always said.
_NOTABLE = 0.01
#: Why fused projections are not divided.
UNKNOWN = "no configuration says how they are divided"
_FATES: Mapping[Fate, str] = {
    "base": "stay the base's",
    "mean": "are merged by the plain mean of the task vectors",
    "sum": "are merged by the plain sum of the task vectors",
}


@dataclass(frozen=True)
class UntouchedKind:
    """Tensors of one kind that an operator passes over.

    Attributes:
        kind: Their name, with ``#`` for numbers.
        tensors: How many there are.
        parameters: How many numbers they hold.
    """

    kind: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Untouched:
    """What an operator passes over.

    Attributes:
        fate: What becomes of it.
        share: Of the merged parameters.
        kinds: The largest first.
        undivided: Fused projections that are taken for one matrix; the largest first.
    """

    fate: Fate
    share: float
    kinds: tuple[UntouchedKind, ...]
    undivided: tuple[UntouchedKind, ...] = ()

    @property
    def sentence(self) -> str:
        """The share and the largest kinds; empty where there is nothing to say."""
        said = []
        if self.kinds and (self.fate == "base" or self.share >= _NOTABLE):
            share = "all" if self.share == 1 else f"{100 * self.share:.2g}%"
            said.append(f"{share} of the parameters {_FATES[self.fate]}: {_named(self.kinds)}")
        if self.undivided:
            said.append(
                f"fused projections are merged as one matrix, as {UNKNOWN}: "
                f"{_named(self.undivided)}"
            )
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "fate": self.fate,
            "share": self.share,
            "kinds": [vars(one) for one in self.kinds],
            "undivided": [vars(one) for one in self.undivided],
        }


def untouched(
    operator: Operator, layout: Layout, options: Mapping[str, Any], config: Config | None = None
) -> Untouched:
    """What an operator passes over, whatever the coefficients.

    Args:
        operator: Which operator; of a blend, what all its members leave in the base.
        layout: Tensors that are merged.
        options: Hyperparameters; its defaults where they are missing.
        config: Content of the base's ``config.json``, which says how fused projections are divided.
    """
    fate, names = _passed_over(operator, layout, options)
    found = _kinds(layout, names)
    total = sum(spec.size for spec in layout.tensors)
    share = sum(one.parameters for one in found) / max(total, 1)
    undivided = _kinds(layout, undivided_names(operator, layout, options, config))
    return Untouched(fate, share, found, undivided)


def undivided_names(
    operator: Operator, layout: Layout, options: Mapping[str, Any], config: Config | None = None
) -> frozenset[str]:
    """Fused projections that an operator takes for one matrix, for want of a configuration.

    Args:
        operator: Which operator; of a blend, any member.
        layout: Tensors that are merged.
        options: Hyperparameters; its defaults where they are missing.
        config: Content of the base's ``config.json``.
    """
    if operator.name == "blend":
        each = (undivided_names(one, layout, {}, config) for one in members_of(options))
        return frozenset().union(*each)
    known = {name: one.default for name, one in operator.hyperparameters.items()}
    if "fused" not in known:
        return frozenset()
    selection = Selection.chosen(layout, {**known, **options}, config)
    return frozenset(
        spec.name for spec in layout.tensors if is_undivided(spec.name, spec.shape, selection)
    )


def _kinds(layout: Layout, names: Collection[str]) -> tuple[UntouchedKind, ...]:
    """Tensors of a layout by kind, the largest first."""
    kinds: dict[str, list[int]] = {}
    for spec in layout.tensors:
        if spec.name in names:
            kinds.setdefault(kind_of(spec.name), []).append(spec.size)
    found = [UntouchedKind(kind, len(sizes), sum(sizes)) for kind, sizes in kinds.items()]
    return tuple(sorted(found, key=lambda one: -one.parameters))


def _named(kinds: Sequence[UntouchedKind]) -> str:
    named = ", ".join(f"{one.kind} ({one.parameters:,} in {one.tensors})" for one in kinds[:_SHOWN])
    more = len(kinds) - _SHOWN
    return f"{named} and {more} more kinds" if more > 0 else named


def _passed_over(
    operator: Operator, layout: Layout, options: Mapping[str, Any]
) -> tuple[Fate, frozenset[str]]:
    """What becomes of the tensors that an operator passes over, and their names."""
    if operator.name == "blend":
        each = [_passed_over(member, layout, {}) for member in members_of(options)]
        kept = [names if fate == "base" else frozenset[str]() for fate, names in each]
        return "base", frozenset.intersection(*kept)
    if operator.name in ("regmean", "regmean_pp"):
        return "mean", _without_layer(layout)
    if operator.name == "pleas":  # which fits convolutions and biases, too
        shapes = shapes_of(layout)
        other = {name for name, shape in shapes.items() if len(shape) not in (2, 4)}
        return "mean", frozenset(name for name in other if not name.endswith("bias"))
    known = {name: one.default for name, one in operator.hyperparameters.items()}
    full = {**known, **options}
    if "matrices" not in full:
        return "base", frozenset()
    selection = Selection.chosen(layout, full)
    names = frozenset(
        spec.name for spec in layout.tensors if not matrices_in(spec.name, spec.shape, selection)
    )
    return full.get("others", "sum"), names  # only OPCM gives no choice: its others are summed


def _without_layer(layout: Layout) -> frozenset[str]:
    """Tensors that are no weights of linear layers or of experts, by their names and shapes."""
    shapes = shapes_of(layout)
    stacks = stack_layouts(shapes)
    return frozenset(
        name
        for name, shape in shapes.items()
        if (name in stacks and not stacks[name].parts) or (len(shape) != 2 and name not in stacks)
    )
