"""One call of another package: what a golden file records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.peers.inputs import Kind, weights

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A merge by a peer.

    Attributes:
        name: Name of the golden file; starts with the peer.
        run: ``run(base, experts, **settings)`` calls the peer.
        settings: The peer's own settings, JSON-able.
        experts: How many experts are merged.
        kind: Which family of weights.
    """

    name: str
    run: Callable[..., Mapping[str, torch.Tensor]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 3
    kind: Kind = "aligned"

    @property
    def peer(self) -> str:
        """``mergekit`` or ``fusion-bench``."""
        return "mergekit" if self.name.startswith("mergekit") else "fusion-bench"

    @property
    def function(self) -> str:
        """What is called: the first line of the caller's docstring."""
        return (self.run.__doc__ or "").strip().split("\n")[0].strip("`.")

    def merged(self) -> torch.Tensor:
        """The peer's result, float32, flat in the order of :data:`tests.peers.inputs.SHAPES`."""
        base, experts = tensors_of(self.experts, self.kind)
        result = self.run(base, experts, **self.settings)
        return torch.cat([result[name].detach().to(torch.float32).reshape(-1) for name in base])


def tensors_of(experts: int, kind: Kind) -> tuple[State, dict[str, State]]:
    """The generated weights as tensors of their own."""
    base, others = weights(experts, kind)
    return _tensors(base), {name: _tensors(state) for name, state in others.items()}


def _tensors(state: Mapping[str, Any]) -> State:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}
