"""Where the weights of two folders differ: which tensors, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.digests import tensor_digests
from mergesearch.merging.checkpoints.opening import open_checkpoint

#: Tensors that a line names; more are counted.
NAMED = 4


@dataclass(frozen=True)
class Difference:
    """How the weights of two folders differ.

    Attributes:
        tensors: Number of tensors of both.
        moved: Tensor of one shape in both -> greatest absolute difference, where bits differ.
        unlike: Tensors that one folder lacks, or that have another shape or dtype there.
    """

    tensors: int
    moved: Mapping[str, float] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()

    @property
    def none(self) -> bool:
        """Whether all weights are equal to the last bit."""
        return not self.moved and not self.unlike

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"tensors": self.tensors, "moved": dict(self.moved), "unlike": list(self.unlike)}

    def lines(self) -> list[str]:
        """For people; none where nothing differs."""
        lines = []
        if self.moved:
            most = sorted(self.moved, key=lambda name: -self.moved[name])
            named = ", ".join(f"{name} by {self.moved[name]:.3g}" for name in most[:NAMED])
            lines.append(
                f"{len(self.moved)} of {self.tensors} tensors differ, at most: {named}"
                + (", ..." if len(most) > NAMED else "")
            )
        if self.unlike:
            named = ", ".join(self.unlike[:NAMED]) + (", ..." if len(self.unlike) > NAMED else "")
            lines.append(f"{len(self.unlike)} tensors are in one alone or of another form: {named}")
        return lines


def difference(ours: Path, theirs: Path) -> Difference:
    """Compare the weights of two folders tensor by tensor; only those with other bits are read.

    Raises:
        CheckpointError: If a folder holds no weights that can be opened.
    """
    first = open_checkpoint(str(ours))
    second = open_checkpoint(str(theirs))
    names = {*first.tensors, *second.tensors}
    alike = sorted(name for name in names if _form(first, name) == _form(second, name))
    before = tensor_digests(first.tensors)
    after = tensor_digests(second.tensors)
    moved = {name: _greatest(first, second, name) for name in alike if before[name] != after[name]}
    return Difference(len(names), moved, tuple(sorted(names - {*alike})))


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]] | None:
    info = checkpoint.tensors.get(name)
    return None if info is None else (info.dtype, tuple(info.shape))


def _greatest(first: Checkpoint, second: Checkpoint, name: str) -> float:
    """The greatest absolute difference of a tensor; NaN where one has NaN."""
    ours = first.read(name).double()
    theirs = second.read(name).double()
    return float(np.abs((ours - theirs).numpy()).max(initial=0.0))
