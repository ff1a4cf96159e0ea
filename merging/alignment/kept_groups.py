"""Groups of a model as a file: they are found by running it, and are the same for every merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.merging.alignment.groups import Flow, Group, Groups, Leaf, Leaves, State

if TYPE_CHECKING:
    import torch

#: Raised when the same model begins to have other groups.
FORMAT = 1


def to_tensors(groups: Groups) -> dict[str, torch.Tensor]:
    """Groups as a named tensor, for a file."""
    import torch

    plain = {
        "groups": [[group.size, list(group.outer), group.kind] for group in groups.groups],
        "tensors": {name: _plain(axes) for name, axes in groups.tensors.items()},
        "reads": [[*place, _plain(axes)] for place, axes in groups.reads.items()],
        "odd": sorted(groups.odd),
        "flows": [[index, _plain_flow(flow)] for index, flow in groups.flows.items()],
        "inputs": dict(groups.inputs),
    }
    text = bytearray(json.dumps(plain).encode())
    return {"groups": torch.frombuffer(text, dtype=torch.uint8)}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Groups:
    """Inverse of :func:`to_tensors`."""
    plain: Any = json.loads(bytes(tensors["groups"].tolist()))
    return Groups(
        tuple(Group(size, tuple(outer), kind) for size, outer, kind in plain["groups"]),
        {name: _leaves(axes) for name, axes in plain["tensors"].items()},
        {(step, place): _leaves(axes) for step, place, axes in plain["reads"]},
        frozenset(plain["odd"]),
        {index: _flow(flow) for index, flow in plain["flows"]},
        plain["inputs"],
    )


def _plain_flow(flow: Flow) -> dict[str, Any]:
    states = [
        [_plain(s.axes), None if s.place is None else list(s.place), s.weight, list(s.added)]
        for s in flow.states
    ]
    return {"states": states, "uses": [[*key, state] for key, state in flow.uses.items()]}


def _flow(plain: Any) -> Flow:
    states = tuple(
        State(_leaves(axes), None if place is None else (place[0], place[1]), weight, tuple(added))
        for axes, place, weight, added in plain["states"]
    )
    return Flow(states, {(name, place): state for name, place, state in plain["uses"]})


def _plain(axes: Leaves) -> list[list[list[int | None]]]:
    return [[[leaf.size, leaf.group] for leaf in axis] for axis in axes]


def _leaves(axes: Sequence[Sequence[Sequence[Any]]]) -> Leaves:
    return tuple(tuple(Leaf(size, group) for size, group in axis) for axis in axes)
