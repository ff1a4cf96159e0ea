"""How much of a merge is lost when its weights are stored in a narrow dtype.

A task vector is small beside the base: in bfloat16 (8 bits of mantissa) much of it can vanish in
the one rounding that a merge does. The share of the change's norm that is lost says how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


#: Elements looked at a time.
BLOCK = 1 << 17


@dataclass(frozen=True)
class Rounding:
    """What rounding lost, and what the merge changed, summed over tensors.

    Attributes:
        lost: Σ (stored − merged)², what rounding changed.
        change: Σ (merged − base)², what the merge changed.
        dtypes: Names of the dtypes that were stored.
    """

    lost: float = 0.0
    change: float = 0.0
    dtypes: frozenset[str] = frozenset()

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.lost + other.lost, self.change + other.change, self.dtypes | other.dtypes
        )

    @property
    def share(self) -> float:
        """‖stored − merged‖ / ‖merged − base‖, 0 where nothing was lost."""
        if self.lost == 0:
            return 0.0
        return math.sqrt(self.lost / self.change) if self.change else math.inf

    def facts(self) -> dict[str, str]:
        """Lines for the model card."""
        stored = ", ".join(sorted(self.dtypes))
        return {
            "stored as": stored,
            "share of the change's norm lost by rounding": f"{self.share:.3%}",
        }

    def sentence(self) -> str:
        """The loss in words."""
        stored = f"stored as {', '.join(sorted(self.dtypes))}"
        return (
            f"{stored}: rounding loses {self.share:.3%} of the norm of the change"
            if self.lost
            else stored
        )


def rounding_of(merged: torch.Tensor, stored: torch.Tensor, base: torch.Tensor) -> Rounding:
    """The loss of storing ``merged`` (wide) as ``stored`` (narrower), relative to ``base``.

    All three on one device.
    """
    import torch

    name = str(stored.dtype).removeprefix("torch.")
    if stored.dtype == merged.dtype or merged.numel() == 0:
        return Rounding(dtypes=frozenset({name}))
    lost = change = 0.0
    flats = (torch.split(tensor.reshape(-1), BLOCK) for tensor in (merged, stored, base))
    for exact, kept, origin in zip(*flats, strict=True):  # block by block, in the cache
        loss = kept.to(merged.dtype).sub_(exact)
        lost += float(torch.dot(loss, loss))
        moved = loss.copy_(exact).sub_(origin)
        change += float(torch.dot(moved, moved))
    return Rounding(lost, change, frozenset({name}))
