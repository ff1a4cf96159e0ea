"""Soft maps of the residual stream that differ from layer to layer.

Imfeld et al., "Transformer Fusion with Optimal Transport" (ICLR 2024), section on residual
connections: what each branch writes has a map ``T_branch`` of its own, and the stream behind the
addition has one made of it and of the map ``T_stream`` before: their mean (*averaging*), or

* *weighted scalar*: ``γ T_branch + (1 − γ) T_stream`` with γ the share of the branch in the sum of
  absolute activations of both;
* *weighted matrix*: the same with a share for each unit.

Activations of the base decide the shares. Layers read the stream by the map that it has there; so
do norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergesearch.merging.alignment.activations import (
    SAMPLES,
    at_batch,
    standardised,
    thinned,
    units_first,
)
from mergesearch.merging.alignment.groups import Flow, State
from mergesearch.merging.alignment.spec import Residual
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.alignment.transport import plan

Units = Mapping[int, torch.Tensor]


def stream_maps(
    subject: Subject, expert: Any, residual: Residual, smoothing: float
) -> dict[tuple[str, int], torch.Tensor]:
    """Stored name and dimension of a tensor -> the map of the state that it writes or reads.

    Args:
        subject: With the base and items.
        expert: Any source of the expert's weights.
        residual: How maps are combined.
        smoothing: Of the plans.
    """
    found = {}
    for index, flow in subject.groups.flows.items():
        if not subject.groups.reorders(index):
            continue
        batches = subject.batches(expert.name)
        ours = _activations(subject, subject.base, flow, batches)
        theirs = _activations(subject, expert, flow, batches)
        maps = _maps(flow, ours, theirs, residual, smoothing)
        found.update({key: maps[state] for key, state in flow.uses.items()})
    return found


def _maps(
    flow: Flow, ours: Units, theirs: Units, residual: Residual, smoothing: float
) -> list[torch.Tensor]:
    """The map of every state, in order: those that are added come before their sum."""
    maps: list[torch.Tensor] = []
    for index, state in enumerate(flow.states):
        if state.added:
            maps.append(_combined([maps[i] for i in state.added], state, ours, residual))
            continue
        cost = torch.cdist(standardised(ours[index]), standardised(theirs[index])) ** 2
        maps.append(len(cost) * plan(cost, smoothing))
    return maps


def _combined(
    maps: list[torch.Tensor], state: State, ours: Units, residual: Residual
) -> torch.Tensor:
    """The map of a sum, from those of what is added."""
    shares = torch.stack([_share(ours[index], residual) for index in state.added])
    shares = shares / shares.sum(0).clamp_min(1e-30)
    total = torch.zeros_like(maps[0])
    for share, own in zip(shares, maps, strict=True):
        total += share[:, None] * own
    return total


def _share(units: torch.Tensor, residual: Residual) -> torch.Tensor:
    """How much a state counts at each unit, before shares are made of it, ``(units,)``."""
    sizes = units.double().abs().mean(1)
    if residual == "averaging":
        return torch.ones_like(sizes)
    if residual == "weighted_scalar":
        return torch.full_like(sizes, float(sizes.sum()))
    return sizes


def _activations(subject: Subject, source: Any, flow: Flow, batches: Any) -> Units:
    """Activations of every state of a source, ``(units, samples)``."""
    groups = subject.groups
    at = {state.place: index for index, state in enumerate(flow.states) if state.place is not None}
    parts: dict[int, list[torch.Tensor]] = {index: [] for index in at.values()}
    limit = max(1, SAMPLES // max(len(batches), 1))
    for taken in subject.features(source, [*at], batches):
        for place, tensor in taken.items():
            axes = at_batch(flow.states[at[place]].axes, tensor)
            parts[at[place]].append(thinned(units_first(tensor, axes, groups), limit))
    found = {index: torch.cat(each, 1) for index, each in parts.items()}
    for index, state in enumerate(flow.states):
        if state.weight:
            found[index] = units_first(source.read(state.weight), state.axes, groups)
    return found
