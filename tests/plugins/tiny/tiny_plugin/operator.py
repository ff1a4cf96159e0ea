"""The operator ``median``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from mergesearch.merging.operators import Basis, TensorSource


class Median:
    """The elementwise median of the task vectors."""

    paper = "Nobody 2026, A median"
    directions = 1
    default = 1.0
    bounds = (0.0, 2.0)
    identities = ("base_at_zero", "linearity", "homogeneity")

    def prepare(
        self,
        base: TensorSource,
        experts: Sequence[TensorSource],
        *,
        share: Annotated[float, Field(gt=0, description="factor of the median")] = 1.0,
    ) -> Basis:
        """One row: the median."""

        def rows(name: str) -> list[Any]:
            origin = base.read(name).float()
            vectors = torch.stack([expert.read(name).float() - origin for expert in experts])
            return [share * vectors.median(dim=0).values]

        return Basis("delta", 1, rows)
