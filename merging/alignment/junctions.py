"""Where the residual stream is added to, and which of its states every tensor reads or writes.

All tensors of the residual stream are one group, because a permutation must be the same everywhere.
Soft maps need not be: Imfeld 2024, "Transformer Fusion with Optimal Transport", sec. 4.1, gives
every branch a map of its own, and combines the maps of branch and stream where they are added.
Here the states of the stream are read from a traced forward pass: a *branch* is what an operation
with a weight writes, a *sum* is where two states are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergesearch.merging.alignment.groups import Flow, Groups, Leaves, State, ToLeaves
from mergesearch.merging.alignment.tracing import RESULT, Seen, Step, Trace

if TYPE_CHECKING:
    from torch import nn

#: Operations that contract inputs with a weight.
CONTRACTIONS = frozenset({"mm", "addmm", "bmm", "convolution", "mv"})
ADDITIONS = frozenset({"add", "add_"})


@dataclass(frozen=True, eq=False)
class Weights:
    """Stored weights by their names in the model.

    Attributes:
        stored: Name in the model -> stored name.
        axes: Stored name -> leaves of its dimensions.
        inputs: Stored name of a linear layer or a convolution -> its dimension of inputs.
    """

    stored: Mapping[str, str]
    axes: Mapping[str, Leaves]
    inputs: Mapping[str, int]


def input_places(model: nn.Module, stored: Mapping[str, str]) -> dict[str, int]:
    """Stored name of a linear layer or a convolution -> its dimension of inputs.

    Args:
        model: Whose layers are meant.
        stored: Stored name -> name in the model.
    """
    from torch import nn

    places = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            places[f"{name}.weight" if name else "weight"] = 1
        elif type(module).__name__ == "Conv1D":
            places[f"{name}.weight"] = 0
    return {name: places[own] for name, own in stored.items() if own in places}


def flows_of(
    traced: Trace, groups: Groups, to_leaves: ToLeaves, weights: Weights
) -> dict[int, Flow]:
    """Group -> its states, for groups whose units are added to.

    Args:
        traced: Of the model.
        groups: Its groups.
        to_leaves: Gives the leaves of traced tensors.
        weights: Of the model.
    """
    added = {
        leaf.group
        for step in traced.steps
        if step.name in ADDITIONS and not any(seen.weight for seen in step.arguments)
        for axis in to_leaves(step.result.dims)
        for leaf in axis
    }
    flows = {
        index: flow_of(traced.steps, index, to_leaves, weights)
        for index in groups.order
        if index in added and not groups.groups[index].outer
    }
    return {i: flow for i, flow in flows.items() if any(state.added for state in flow.states)}


def flow_of(steps: Iterable[Step], group: int, to_leaves: ToLeaves, weights: Weights) -> Flow:
    """The states of a group.

    Args:
        steps: Of a forward pass.
        group: Index of the group.
        to_leaves: Gives leaves.
        weights: Of the model.
    """
    reader = _Reader(group, to_leaves, weights)
    for step in steps:
        reader.follow(step)
    return Flow(tuple(reader.states), reader.uses)


@dataclass
class _Reader:
    """Follows one group through a forward pass."""

    group: int
    to_leaves: ToLeaves
    weights: Weights
    states: list[State] = field(default_factory=list)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    _at: dict[int, int] = field(default_factory=dict)  # tensor -> its state
    _names: dict[int, str] = field(default_factory=dict)  # view of a weight -> its stored name

    def follow(self, step: Step) -> None:
        """Take in the next operation."""
        own = [seen for seen in step.arguments if self._name(seen)]
        others = [seen for seen in step.arguments if not self._name(seen)]
        if len(own) == 1 and not others and step.name != "embedding":
            self._names[step.result.number] = self._name(own[0])
            return
        given = [self._at[seen.number] for seen in others if seen.number in self._at]
        self._at.pop(step.result.number, None)
        if step.name in CONTRACTIONS:
            for seen in own:
                self._use(self._name(seen), given[:1], inputs=True)
        if not self._holds(step.result):
            return
        if (step.name in CONTRACTIONS and own) or step.name == "embedding":
            state = self._add(State(self._leaves(step.result), (step.number, RESULT)))
            for seen in own:
                self._use(self._name(seen), [state])
        else:
            states = [*given, *self._weight_states(step, own)]
            if not states:
                return
            state = self._summed(step, states)
            for seen in own:
                self._use(self._name(seen), [state])
        self._at[step.result.number] = state

    def _summed(self, step: Step, states: Sequence[int]) -> int:
        if step.name not in ADDITIONS or len({*states}) < 2:
            return states[0]
        place = (step.number, RESULT)
        return self._add(State(self._leaves(step.result), place, added=tuple(sorted({*states}))))

    def _weight_states(self, step: Step, own: Sequence[Seen]) -> list[int]:
        """States that are weights themselves, such as embeddings of positions."""
        if step.name not in ADDITIONS:
            return []
        found = []
        for seen in own:
            if len(seen.dims) > 1 and self._holds(seen):
                name = self._name(seen)
                found.append(self._add(State(self.weights.axes[name], None, name)))
                self._use(name, found[-1:])
        return found

    def _use(self, name: str, states: Sequence[int], *, inputs: bool = False) -> None:
        """Say which state the dimensions of a weight belong to, unless they have one."""
        axes = self.weights.axes[name]
        read = self.weights.inputs.get(name)
        for place, axis in enumerate(axes):
            holds = any(leaf.group == self.group for leaf in axis)
            for state in states if holds and (place == read) == inputs else ():
                self.uses.setdefault((name, place), state)

    def _add(self, state: State) -> int:
        self.states.append(state)
        return len(self.states) - 1

    def _name(self, seen: Seen) -> str:
        """The stored name of a weight or of a view of it; empty for anything else."""
        known = self.weights.stored.get(seen.weight or "", "")
        name = known or self._names.get(seen.number, "")
        return name if name in self.weights.axes else ""

    def _leaves(self, seen: Seen) -> Leaves:
        return self.to_leaves(seen.dims)

    def _holds(self, seen: Seen) -> bool:
        return any(leaf.group == self.group for axis in self._leaves(seen) for leaf in axis)
