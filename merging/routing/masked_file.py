"""The tensors of a merge under task masks in a bundle.

``sum.NAME`` is what is added to a tensor of the base, ``mask.NAME`` a bit for each weight and task
``(K, bytes)``; a trained router is stored as Twin-Merging's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergesearch.merging.checkpoints.safetensors_files import read_header
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.shown import path_shown, shown
from mergesearch.merging.models.task_heads import TaskHead
from mergesearch.merging.routing.masked import Held, MaskedMerge
from mergesearch.merging.routing.router import PREFIX, router_tensors, stored_router
from mergesearch.merging.routing.task_routers import LearnedRouter, untrained_router
from mergesearch.merging.routing.vectors import copied_tensors

KINDS = ("sum", "mask")


def masked_tensors(merge: MaskedMerge) -> dict[str, torch.Tensor]:
    """What a bundle stores of a merge."""
    router = merge.router
    tensors = router_tensors(router.network) if isinstance(router, LearnedRouter) else {}
    for name, own in merge.held.items():
        tensors |= {f"{kind}.{name}": own[kind].cpu().contiguous() for kind in KINDS}
    return tensors


def load_masked(
    model: nn.Module,
    file: Path,
    routing: Mapping[str, Any],
    tasks: Sequence[str],
    head: TaskHead | None,
) -> MaskedMerge:
    """The merge of a bundle.

    Args:
        model: The base.
        file: Where the tensors are.
        routing: Of the recipe.
        tasks: Names of the K tasks.
        head: The heads of the experts, where they have their own.

    Raises:
        CheckpointError: If the tensors do not fit the base.
    """
    from safetensors.torch import load_file

    read_header(file)  # names what the library would stumble over
    stored = load_file(file)
    parts = {
        kind: {name.partition(".")[2] for name in stored if name.startswith(f"{kind}.")}
        for kind in KINDS
    }
    held = {
        name: {kind: stored[f"{kind}.{name}"] for kind in KINDS if name in parts[kind]}
        for name in sorted(parts["sum"] | parts["mask"])
    }
    base = copied_tensors(model)
    check_held(held, base, len(tasks), path_shown(file))
    merge = MaskedMerge(model, base, held, tasks, head=head)
    merge.router = untrained_router(merge, routing)
    if any(name.startswith(PREFIX) for name in stored):
        with library_errors(path_shown(file), "the router of the bundle", CheckpointError):
            merge.router = LearnedRouter(stored_router(stored, len(tasks)))
    return merge


def check_held(held: Held, base: Mapping[str, torch.Tensor], experts: int, where: str) -> None:
    """Refuse stored sums and masks that do not fit a base.

    Raises:
        CheckpointError: In one line.
    """
    for name, own in held.items():
        size = base[name].numel() if name in base else 0
        wanted = {"sum": tuple(base[name].shape), "mask": (experts, -(-size // 8))} if size else {}
        received = {kind: tuple(tensor.shape) for kind, tensor in own.items()}
        if received != wanted or own["mask"].dtype != torch.uint8:
            raise CheckpointError(
                f"{where}: expected the sum and the masks of {experts} tasks for a tensor of the "
                f"base, received {shown(received)} for {shown(name)}; export the merge again"
            )
