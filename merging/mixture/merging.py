"""The tensors of a block whose experts are merged as planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.mixture.grouping import Group, Slot
from mergesearch.merging.mixture.layers import ExpertWeights, read_experts, stored_tensors
from mergesearch.merging.mixture.operators import MixtureOperator, MixtureOptions
from mergesearch.merging.mixture.planning import BlockPlan
from mergesearch.merging.mixture.statistics import Numbers
from mergesearch.merging.mixture.weights import shares, stored_like, weighted_mean, wide

if TYPE_CHECKING:
    import torch


def merged_block(
    checkpoint: Checkpoint, plan: BlockPlan, operator: MixtureOperator, options: MixtureOptions
) -> dict[str, torch.Tensor]:
    """Name -> tensor of a block with the experts that are kept, in the base's dtypes.

    A group of one expert has its weights bit for bit, unless the operator compresses it.
    """
    experts = read_experts(checkpoint, plan.layer)
    usage = plan.statistics.usage
    merged = [_merged(experts, group, usage, operator, options) for group in plan.groups]
    chosen = [merged[slot.group] for slot in plan.slots]
    return stored_tensors(plan.layer, chosen, _router(checkpoint, plan))


def _merged(
    experts: Sequence[ExpertWeights],
    group: Group,
    usage: Numbers,
    operator: MixtureOperator,
    options: MixtureOptions,
) -> ExpertWeights:
    leader = experts[group[0]]
    if len(group) == 1 and not operator.changes_single(options):
        return leader
    members = operator.members([wide(experts[index]) for index in group], options)
    made = operator.merge(members, shares(usage[list(group)]), options)
    return stored_like(made, leader)


def _router(checkpoint: Checkpoint, plan: BlockPlan) -> torch.Tensor:
    """The router's matrix ``(experts, width)``, with a row for each slot."""
    import torch

    rows = checkpoint.read(plan.layer.router)
    return torch.stack([_row(rows, slot, plan.statistics.usage) for slot in plan.slots])


def _row(rows: torch.Tensor, slot: Slot, usage: Numbers) -> torch.Tensor:
    if len(slot.rows) == 1:
        return rows[slot.expert]
    weights = shares(usage[list(slot.rows)])
    return weighted_mean([rows[index] for index in slot.rows], weights)


def member_block(
    checkpoint: Checkpoint,
    plan: BlockPlan,
    operator: MixtureOperator,
    options: MixtureOptions,
    number: int,
) -> dict[str, torch.Tensor]:
    """The block of :func:`merged_block` with one member of each group in place of the merge.

    Groups that have no such member keep the merge, and so does the router.

    Args:
        checkpoint: The base.
        plan: Of the block.
        operator: What merges.
        options: Its hyperparameters.
        number: Place of the member in its group; 0 is the leader.
    """
    experts = read_experts(checkpoint, plan.layer)
    usage = plan.statistics.usage
    merged = []
    for group in plan.groups:
        if 1 < len(group) > number:
            each = operator.members([wide(experts[index]) for index in group], options)
            merged.append(stored_like(each[number], experts[group[0]]))
        else:
            merged.append(_merged(experts, group, usage, operator, options))
    chosen = [merged[slot.group] for slot in plan.slots]
    return stored_tensors(plan.layer, chosen, _router(checkpoint, plan))
