"""Locks a model against merging: another point of weight space, the same function.

After MergeLock (Wang 2025, arXiv 2509.01548). The maps are drawn from a seed and are not recorded
in the folder: who has the seed can undo them exactly, everyone can undo most of them by least
squares against the base (``special.unlock``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.attention.locking import locked_heads
from mergesearch.merging.attention.realigning import mappable
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.export.rewritten import write_rewritten
from mergesearch.merging.foreign.shown import path_shown

if TYPE_CHECKING:
    import torch

#: Difference of answers, over the greatest, that a lock may make; and how many roundings of the
#: stored dtype where that is more.
TOLERANCE = 1e-4
ROUNDINGS = 16


@dataclass(frozen=True)
class Locked:
    """A locked model.

    Attributes:
        folder: Where it is.
        attentions: Attentions whose heads were mapped.
        pairs: Pairs of sides that were mapped, of all.
        rotary: How many of these only within couples of features that positions turn.
        difference: Greatest difference of its answers over the greatest; None where they were not
            compared.
        reason: Why they were not.
    """

    folder: Path
    attentions: int
    pairs: int
    rotary: int
    difference: float | None
    reason: str = ""


def lock_model(source_path: str, out: Path, *, seed: int = 0, overwrite: bool = False) -> Locked:
    """Write a model with the same function whose merges with its relatives fail.

    Args:
        source_path: The model.
        out: Folder to create; may exist if it is empty.
        seed: Of the maps.
        overwrite: Replace a folder that is not empty.

    Raises:
        CheckpointError: If there is no such model, or no heads that can be mapped.
        InputError: If the answers change, or ``out`` cannot be written.
    """
    source = open_checkpoint(source_path)
    if source.denoiser:
        raise InputError(
            f"{path_shown(source_path)}: expected a model of transformers, received a pipeline; "
            "lock the folder of its denoiser"
        )
    shapes = {name: shape for name, (shape, _) in source.merged.items()}
    attentions = mappable(shapes, source.config) if source.config else []
    if not attentions:
        raise CheckpointError(
            f"{path_shown(source_path)}: expected attention whose heads are known from config.json "
            "and have no norm between their sides, received none; there is nothing to lock"
        )
    heads = locked_heads(attentions, seed)
    compared: list[float | None] = []
    reasons: list[str] = []

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        return heads.apply(name, tensor, "float64") if name in heads.names else tensor

    def check(folder: Path) -> None:
        difference, reason = _difference(source_path, folder, source.config)
        reasons.append(reason)
        compared.append(difference)
        _refuse(source_path, difference, _tolerance([source.tensors[n].dtype for n in heads.names]))

    write_rewritten(source, out, read, overwrite=overwrite, check=check)
    free = [one for _, pairs in attentions for one in pairs]
    rotary = sum(len(one.one) > 0 for one in free)
    return Locked(out, len(attentions), len(free), rotary, compared[0], reasons[0])


def _difference(source: str, folder: Path, config: Mapping[str, Any]) -> tuple[float | None, str]:
    """How far the answers are apart, or why that is not known."""
    from mergesearch.merging.models.same_answers import greatest_difference

    try:
        found = greatest_difference(source, str(folder), config)
    except (InputError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return None, f"the model could not be run here ({type(error).__name__})"
    return found, "" if found is not None else "its inputs are not of a known kind"


def _tolerance(dtypes: list[str]) -> float:
    import torch

    coarsest = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    return max(TOLERANCE, ROUNDINGS * coarsest) if coarsest > 1e-6 else TOLERANCE


def _refuse(source: str, difference: float | None, tolerance: float) -> None:
    if difference is not None and not difference <= tolerance:
        raise InputError(
            f"{path_shown(source)}: expected the same answers after the lock, within "
            f"{tolerance:.1g}, received a difference of {difference:.2g}: something acts on single "
            "features of its heads; nothing was written"
        )
