"""Accuracy and cross-entropy of an image classifier on a ``datasets`` folder, item by item.

Scores are overall or by domain. One forward pass over a split serves all objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.by_item import ByItem, Metric, domain_names, wide

if TYPE_CHECKING:
    import torch

__all__ = ["Classification", "Metric"]


@dataclass(frozen=True, eq=False)
class _Items:
    """A split in memory.

    Attributes:
        images: Pixels ``(items, channels, height, width)``.
        labels: Class numbers ``(items,)``.
        domains: Domain of each item ``(items,)``.
    """

    images: torch.Tensor
    labels: torch.Tensor
    domains: npt.NDArray[np.str_]

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> _Items:
        """The items at some indices."""
        return _Items(self.images[indices], self.labels[indices], self.domains[indices])


class Classification(ByItem):
    """Scores an image classification model; see :class:`ByItem` for its arguments."""

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    model_class: str | None = "AutoModelForImageClassification"

    def _read(self, columns: Mapping[str, Any]) -> _Items:
        return _as_items(columns["input"], columns["label"], columns.get("domain"))

    def _logits(self, model: Any, items: _Items) -> torch.Tensor:
        """Logits ``(items, classes)``."""
        parameter = next(model.parameters())
        logits: torch.Tensor = model(items.images.to(parameter.device, parameter.dtype)).logits
        return logits

    def _scores(self, model: Any, items: _Items) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.functional import cross_entropy

        logits = wide(self._logits(model, items))
        labels = items.labels.to(logits.device)
        # A row of NaN has an argmax too; it must not count as an answer.
        finite = torch.isfinite(logits).all(dim=1)
        right = torch.where(finite, (logits.argmax(dim=1) == labels).float(), torch.nan)
        return {"accuracy": right, "cross_entropy": cross_entropy(logits, labels, reduction="none")}


def _as_items(images: Any, labels: Any, domains: Any) -> _Items:
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if pixels.ndim == 3:  # (items, height, width): the channel axis is implied
        pixels = pixels[:, None]
    names = domain_names(domains, len(pixels))
    return _Items(pixels, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)), names)
