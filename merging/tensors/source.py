"""Sources of named tensors, as operators see them, and results that are kept for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.memo import Memo, Tensors, laid_out

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]


class TensorSource(Protocol):
    """Named tensors, read one at a time: a checkpoint on disk, or a mapping in memory."""

    @property
    def name(self) -> str:
        """Short name of the source, as in recipes; random masks and declared orders go by it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors that are merged, in the order of the layout."""

    @property
    def memo(self) -> Memo | None:
        """Where results are kept that other hyperparameters can use again, or None."""

    @property
    def identity(self) -> str:
        """Identity of the weights, for the keys of ``memo``; empty where there is none."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its stored dtype; not to be modified."""


def shapes_of(source: TensorSource | Layout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all merged tensors."""
    if isinstance(source, Layout):
        return {spec.name: spec.shape for spec in source.tensors}
    return {name: source.shape(name) for name in source.names}


@dataclass(frozen=True)
class Factors:
    """The rows of one matrix as low-rank products.

    ``row_k = left[:, owner == k] @ right[owner == k]``.

    Attributes:
        left: ``(m, R)``, fp32.
        right: ``(R, n)``, fp32.
        owner: Direction of each of the R columns, non-decreasing.
    """

    left: torch.Tensor
    right: torch.Tensor
    owner: tuple[int, ...]


@dataclass(frozen=True)
class FilteredSource:
    """A tensor source without some of its tensors."""

    origin: TensorSource
    excluded: frozenset[str]

    @property
    def name(self) -> str:
        """Short name of the source."""
        return self.origin.name

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors that are left."""
        return [name for name in self.origin.names if name not in self.excluded]

    @property
    def memo(self) -> Memo | None:
        """That of the source."""
        return self.origin.memo

    @property
    def identity(self) -> str:
        """Identity of what is left; empty if the source has none."""
        if not self.origin.identity:
            return ""
        return hashlib.sha256(
            " ".join([self.origin.identity, *sorted(self.excluded)]).encode()
        ).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.origin.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor."""
        return self.origin.read(name)


def remembered(
    sources: Sequence[TensorSource], key: Sequence[Any], compute: Callable[[], Tensors]
) -> Tensors:
    """The tensors that ``compute`` gives, kept in the memo of the first source if it has one.

    They lie in memory alike with a memo and without one, so that what is made of them has the same
    bits.

    Args:
        sources: What the result depends on, in order.
        key: What else it depends on, beginning with what it is; hyperparameters only as far as they
            matter.
        compute: Makes the tensors; must be a function of ``sources`` and ``key`` alone.
    """
    memo = sources[0].memo
    if memo is None or not all(source.identity for source in sources):
        return laid_out(compute())
    return memo.get([*key, *(source.identity for source in sources)], compute)
