"""Integer tensors, which a merge copies from the base, and a warning where experts differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.messages import listed, warn
from mergesearch.merging.tensors.layout import FLOATING

if TYPE_CHECKING:
    import torch


def warn_of_integers(family: ModelFamily) -> None:
    """Warn of integer tensors of which an expert has others than the base; reads them."""
    base = family.base
    names = [name for name in base.carried if base.tensors[name].dtype not in FLOATING]
    odd = [
        n
        for n in names
        if any(n in e.tensors and differs(base.read(n), e.read(n)) for e in family.experts)
    ]
    warn(integers_warning(odd))


def integers_warning(names: Collection[str]) -> str | None:
    """The text of a warning about integer tensors that differ, or None if there are none."""
    return (
        f"integer tensors differ and are copied from the base: {listed(names)}" if names else None
    )


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold other values; compares across dtypes and devices."""
    return one.shape != other.shape or bool((one != other.to(one.device)).any())
