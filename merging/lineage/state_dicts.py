"""Lineage of state dicts: the same samples and the same verdict as for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.lineage.verdict import JUDGED_FROM
from mergesearch.merging.tensors.layout import Layout, TensorSpec

if TYPE_CHECKING:
    import torch

_PATH = "state dict"


@dataclass(frozen=True, eq=False, kw_only=True)
class StateCheckpoint(Checkpoint):
    """A state dict seen as a checkpoint without files.

    Attributes:
        state: Name -> tensor.
    """

    state: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def merged(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """All its tensors: name -> (shape, dtype)."""
        return {name: (info.shape, info.dtype) for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself."""
        return self.state[name].detach()


def state_lineages(
    base: Mapping[str, torch.Tensor],
    experts: Sequence[tuple[str, Mapping[str, torch.Tensor]]],
    layout: Layout,
    config: Mapping[str, Any] | None = None,
) -> tuple[Lineage, ...]:
    """Lineage of every expert; none where there are too few weights to judge.

    Args:
        base: The base.
        experts: Name and weights of each, with the base's names and shapes.
        layout: Tensors that are compared.
        config: Content of the model's ``config.json``, which tells the heads of attention.
    """
    if layout.parameters < JUDGED_FROM:
        return ()
    first = _checkpoint("base", base, layout, config)
    return tuple(
        compare_weights(first, _checkpoint(name, state, layout, config)) for name, state in experts
    )


def _checkpoint(
    name: str,
    state: Mapping[str, torch.Tensor],
    layout: Layout,
    config: Mapping[str, Any] | None,
) -> StateCheckpoint:
    tensors = {spec.name: _info(spec, state[spec.name]) for spec in layout.tensors}
    return StateCheckpoint(name, _PATH, None, tensors, config or {}, state=state)


def _info(spec: TensorSpec, tensor: torch.Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(spec.shape, dtype, Path(), 0, spec.size * ITEMSIZE.get(dtype, 1))
