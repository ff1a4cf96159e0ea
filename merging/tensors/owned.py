"""Which units of a tensor a source has, where layers hold units of several models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: For each dimension of a tensor: which of its units a source has ``(units,)``; None for all.
Owned = tuple["torch.Tensor | None", ...]


def has_owners(source: Any) -> bool:
    """Whether a source is seen in layers that hold units of several models."""
    return _maker(source) is not None


def owned_units(source: Any, name: str) -> Owned:
    """Which units of a tensor a source has; an empty tuple where it has all of them.

    Sources that pass on what another one reads are followed to that one.
    """
    maker = _maker(source)
    found: Owned = () if maker is None else maker(name)
    return found


def _maker(source: Any) -> Any:
    while source is not None:
        own = getattr(source, "owned", None)
        if own is not None:
            return own
        source = getattr(source, "origin", None)
    return None
