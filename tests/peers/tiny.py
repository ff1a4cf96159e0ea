"""A model of the shape of :data:`tests.peers.inputs.SHAPES`, for operators that run one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from tests.peers.inputs import BLOCKS, CLASSES, HIDDEN, INNER, VOCABULARY, Array, tokens


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, INNER)
        self.fc2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A residual block that mixes positions by their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(HIDDEN)
        self.attention = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.layer_norm(x)
        return x + self.attention(seen + seen.mean(1, keepdim=True)) + self.mlp(seen)


class Tiny(nn.Module):
    """Classifies sequences of tokens: ``(samples, length)`` -> logits ``(samples, classes)``."""

    def __init__(self, state: Mapping[str, Array] | Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)
        self.load_state_dict(
            {name: torch.tensor(np.asarray(tensor)) for name, tensor in state.items()}
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.head(x.mean(1))


def inputs_of(expert: str) -> torch.Tensor:
    """Token ids of one expert's task."""
    return torch.from_numpy(tokens(expert))
