"""Whether two checkpoints have the same shapes, known from their headers."""

from __future__ import annotations

from mergesearch.merging.checkpoints.checkpoint import Checkpoint


def same_shapes(base: Checkpoint, expert: Checkpoint) -> bool:
    """Whether all merged tensors that an expert shares with its base have the base's shape."""
    shapes = {name: shape for name, (shape, _) in expert.merged.items() if name in base.merged}
    return all(base.shape(name) == shape for name, shape in shapes.items())
