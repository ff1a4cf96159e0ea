"""The tensors of a block whose experts are merged as planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.mixture.grouping import Group, Slot
from mergesearch.merging.mixture.layers import ExpertWeights, read_experts, stored_tensors
from mergesearch.merging.mixture.operators import MixtureOperator, MixtureOptions
from mergesearch.merging.mixture.orders import NeuronOrders
from mergesearch.merging.mixture.planning import BlockPlan
from mergesearch.merging.mixture.statistics import Numbers
from mergesearch.merging.mixture.weights import in_order, shares, stored_like, weighted_mean, wide

if TYPE_CHECKING:
    import torch


def merged_block(
    checkpoint: Checkpoint,
    plan: BlockPlan,
    operator: MixtureOperator,
    options: MixtureOptions,
    orders: NeuronOrders,
) -> dict[str, torch.Tensor]:
    """Name -> tensor of a block with the experts that are kept, in the base's dtypes.

    A group of one expert has its weights bit for bit, unless the operator compresses it.

    Args:
        checkpoint: The base.
        plan: Of the block.
        operator: What merges.
        options: Its hyperparameters.
        orders: Orders of neurons that are known.
    """
    experts = read_experts(checkpoint, plan.layer)
    merged = [_merged(experts, group, plan, operator, options, orders) for group in plan.groups]
    chosen = [merged[slot.group] for slot in plan.slots]
    return stored_tensors(plan.layer, chosen, _router(checkpoint, plan))


def _merged(
    experts: Sequence[ExpertWeights],
    group: Group,
    plan: BlockPlan,
    operator: MixtureOperator,
    options: MixtureOptions,
    orders: NeuronOrders,
) -> ExpertWeights:
    leader = experts[group[0]]
    if len(group) == 1 and not operator.changes_single(options):
        return leader
    members = _members(experts, group, plan, orders if operator.aligns(options) else None)
    made = operator.merge(members, plan.shares_of(group), options)
    return stored_like(made, leader)


def _members(
    experts: Sequence[ExpertWeights], group: Group, plan: BlockPlan, orders: NeuronOrders | None
) -> list[ExpertWeights]:
    """Experts of a group as they enter the merge, the leader first, in its order if asked for."""
    members = [wide(experts[index]) for index in group]
    if orders is None:
        return members
    leader = members[0]
    block = plan.layer.block
    others = zip(group[1:], members[1:], strict=True)
    return [
        leader,
        *(in_order(own, orders.of(block, group[0], index, own, leader)) for index, own in others),
    ]


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
    orders: NeuronOrders,
    number: int,
) -> dict[str, torch.Tensor]:
    """The block of :func:`merged_block` with one member of each group in place of the merge.

    Groups that have no such member keep the merge, and so does the router.

    Args:
        checkpoint: The base.
        plan: Of the block.
        operator: What merges.
        options: Its hyperparameters.
        orders: Orders of neurons that are known.
        number: Place of the member in its group; 0 is the leader.
    """
    experts = read_experts(checkpoint, plan.layer)
    merged = []
    for group in plan.groups:
        if 1 < len(group) > number:
            each = _members(experts, group, plan, orders if operator.aligns(options) else None)
            merged.append(stored_like(each[number], experts[group[0]]))
        else:
            merged.append(_merged(experts, group, plan, operator, options, orders))
    chosen = [merged[slot.group] for slot in plan.slots]
    return stored_tensors(plan.layer, chosen, _router(checkpoint, plan))
