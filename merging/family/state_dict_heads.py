"""Heads of state dicts, which have names and shapes but no label sets.

The counterpart of :mod:`mergesearch.merging.family.heads`, which does so for files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from mergesearch.merging.family.head_names import odd_heads, refuse_other_depths, refuse_uneven
from mergesearch.merging.family.missing_tensors import starting_tensor
from mergesearch.merging.policies import TensorPolicies

StateDict = Mapping[str, torch.Tensor]


def with_heads(
    base: StateDict, experts: Sequence[StateDict], policies: TensorPolicies
) -> tuple[StateDict, Sequence[StateDict], set[str]]:
    """States without what each keeps for itself, and the names that no coefficient acts on.

    The merged state has the base's heads, or the average of the experts'; with ``own`` the
    experts' are left to the caller, who has them. With ``absent: own`` it also has the tensors
    that exactly one expert has.

    Raises:
        CheckpointError: If heads to be averaged do not line up, or states have other depths.
    """
    shapes = [_shapes(state) for state in (base, *experts)]
    names: set[str] = set() if policies.heads == "refuse" else odd_heads(shapes)
    made: dict[str, torch.Tensor] = {}
    if policies.heads == "average":
        heads = sorted(name for name in names if any(name in expert for expert in experts))
        made = {name: _average(name, base, experts) for name in heads}
    if policies.absent == "own":
        new = {name for own in shapes[1:] for name in own if name not in base}
        refuse_other_depths(new, shapes, "special.absent: own")
        names |= new
        made |= _of_one_expert(new, experts)
    if not names:
        return base, experts, set()
    first = {**base, **made}
    kept = {name: first[name] for name in names if name in first}
    others = [{**_without(expert, names), **kept} for expert in experts]
    return first, others, set(kept)


def _shapes(state: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}


def _without(state: StateDict, names: Collection[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def _average(name: str, base: StateDict, experts: Sequence[StateDict]) -> torch.Tensor:
    refuse_uneven(name, {str(tuple(e[name].shape)) if name in e else "none" for e in experts})
    like = base.get(name, experts[0][name])
    return starting_tensor([expert[name] for expert in experts], "average").to(like.dtype)


def _of_one_expert(names: Collection[str], experts: Sequence[StateDict]) -> dict[str, torch.Tensor]:
    owners = {name: [expert for expert in experts if name in expert] for name in sorted(names)}
    return {name: found[0][name] for name, found in owners.items() if len(found) == 1}
