"""Adapters in memory, for operators that need the low-rank factors of their experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergesearch.merging.operators import TensorSource

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Adapted:
    """A model with low-rank changes of some tensors.

    Attributes:
        model: What the changes are added to.
        pairs: Tensor name -> ``(m, r)`` and ``(r, n)``.
        transposed: Names of the tensors that are stored as (in, out).
    """

    model: TensorSource
    pairs: Mapping[str, Pair]
    transposed: frozenset[str] = frozenset()
    memo: None = None
    identity: str = ""
    name: str = field(default="adapter")

    @property
    def names(self) -> Sequence[str]:
        return self.model.names

    @property
    def changes(self) -> Mapping[str, tuple[Any, bool]]:
        return {name: (None, name in self.transposed) for name in self.pairs}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.model.shape(name)

    def read(self, name: str) -> torch.Tensor:
        origin = self.model.read(name)
        if name not in self.pairs:
            return origin
        left, right = self.pairs[name]
        return origin + (left @ right).view(origin.shape).to(origin.dtype)

    def factors(self, name: str) -> Pair | None:
        return self.pairs.get(name)

    def low_rank(self, name: str, base: TensorSource) -> Pair | None:
        """The factors where the model below is the base."""
        return self.pairs.get(name) if torch.equal(self.model.read(name), base.read(name)) else None


@dataclass(frozen=True)
class Factored:
    """A full checkpoint seen as an adapter.

    Its changed matrices are factors of full rank, the rest is stored whole.
    """

    expert: TensorSource
    base: TensorSource
    memo: None = None
    identity: str = ""

    @property
    def name(self) -> str:
        return self.expert.name

    @property
    def names(self) -> Sequence[str]:
        return self.expert.names

    @property
    def changes(self) -> Mapping[str, tuple[Any, bool]]:
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.expert.shape(name)

    def read(self, name: str) -> torch.Tensor:
        return self.expert.read(name)

    def factors(self, name: str) -> Pair | None:
        if len(self.shape(name)) != 2:
            return None
        change = self.read(name).float() - self.base.read(name).float()
        return torch.eye(len(change)), change

    def low_rank(self, name: str, base: TensorSource) -> Pair | None:
        return self.factors(name)


def as_adapters(base: TensorSource, experts: Sequence[TensorSource]) -> list[Factored]:
    return [Factored(expert, base) for expert in experts]
