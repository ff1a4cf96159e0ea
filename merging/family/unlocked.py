"""Experts whose heads were turned, brought back to where they are nearest to the base's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from mergesearch.merging.attention.realigning import MappedHeads, mappable, realigned
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import CheckpointError, RecipeError
from mergesearch.merging.family.aligned import unstored, with_tensors
from mergesearch.merging.family.messages import listed
from mergesearch.merging.foreign.shown import shown

if TYPE_CHECKING:
    import torch


def unlocked(
    base: Checkpoint, experts: Sequence[Checkpoint], names: Sequence[str]
) -> Sequence[Checkpoint]:
    """The experts, those that are named with heads near the base's; no weight is read yet.

    Raises:
        RecipeError: If there is no expert of a name.
        CheckpointError: If one of them has no heads that can be turned.
    """
    strange = [name for name in names if name not in {expert.name for expert in experts}]
    if strange:
        raise RecipeError(
            f"special.unlock: expected names of experts ({listed([e.name for e in experts])}), "
            f"received {shown(strange[0])}"
        )
    return [_unlocked(base, expert) if expert.name in names else expert for expert in experts]


def _unlocked(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    shapes = {
        name: shape
        for name, (shape, _) in base.merged.items()
        if expert.merged.get(name, ((), ""))[0] == shape
    }
    attentions = mappable(shapes, base.config)
    if not attentions:
        raise CheckpointError(
            f"expert {expert.name!r} ({expert.path}): expected heads of attention to unlock, "
            "received none whose names and configuration are known; leave out unlock"
        )
    heads = realigned(base.read, expert.read, attentions)
    read = lru_cache(maxsize=4)(partial(_read, heads, base, expert))
    made = {
        name: (unstored(expert, shapes[name], _wide(base, expert, name)), partial(read, name))
        for name in heads.names
    }
    return with_tensors(
        expert, made, done="unlocked", beside=[base], realigned=frozenset(heads.names)
    )


def _wide(base: Checkpoint, expert: Checkpoint, name: str) -> str:
    """The dtype in which a mapped tensor is given."""
    wide = "float64" in (base.tensors[name].dtype, expert.tensors[name].dtype)
    return "float64" if wide else "float32"


def _read(heads: MappedHeads, base: Checkpoint, expert: Checkpoint, name: str) -> torch.Tensor:
    return heads.apply(name, expert.read(name), _wide(base, expert, name))
