"""Merges of small perceptrons by blocks of neighbouring units: scores and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from experiments.league.landscape import Array, Rows
from experiments.league.networks import Zoo, forward, rightly, row_numbers


@dataclass(frozen=True, eq=False)
class NetworkMerges:
    """A coefficient for each block and expert.

    Attributes:
        zoo: What is merged.
        blocks: Number of blocks, of as many units each as can be.
    """

    zoo: Zoo
    blocks: int

    @property
    def experts(self) -> int:
        """Number of experts, and of tasks."""
        return len(self.zoo.vectors)

    @cached_property
    def edges(self) -> Rows:
        """First flat weight of each block, and the end ``(blocks + 1,)``."""
        rows = row_numbers()
        block_of = rows * self.blocks // (rows[-1] + 1)
        return np.append(np.searchsorted(block_of, np.arange(self.blocks)), rows.size)

    def merged(self, point: Array) -> npt.NDArray[np.float32]:
        """Flat weights of the merge at a point."""
        table = point.reshape(self.blocks, self.experts).astype(np.float32)
        weights = self.zoo.base.copy()
        lengths = np.diff(self.edges)
        for expert, vector in enumerate(self.zoo.vectors):
            weights += np.repeat(table[:, expert], lengths) * vector
        return weights

    def right(self, point: Array, split: str, rows: Sequence[Rows]) -> Array:
        """Scores of chosen scans of every task ``(tasks, items)``."""
        inputs, digits = self._chosen(split, rows)
        right = rightly(self.merged(point), inputs, digits)
        return right.astype(np.float64).reshape(len(rows), -1)

    def loss_and_gradient(
        self, point: Array, split: str, rows: Sequence[Rows], weights: Array
    ) -> tuple[float, Array]:
        """Cross-entropy of chosen scans, weighted by task, and its gradient ``(dim,)``."""
        import torch

        inputs, digits = self._chosen(split, rows)
        flat = torch.from_numpy(self.merged(point)).requires_grad_()
        logits = forward(flat, torch.from_numpy(inputs), torch.relu)
        each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(digits), reduction="none")
        loss = (each.reshape(len(rows), -1).mean(1) * torch.from_numpy(weights)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert flat.grad is not None
        products = self.zoo.vectors * flat.grad.numpy()
        slope = np.add.reduceat(products, self.edges[:-1], axis=1)
        return float(loss.detach()), slope.T.ravel().astype(np.float64)

    def _chosen(
        self, split: str, rows: Sequence[Rows]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        data = self.zoo.data
        inputs = np.concatenate([data.inputs[split][task, r] for task, r in enumerate(rows)])
        return inputs, np.concatenate([data.digits[split][r] for r in rows])
