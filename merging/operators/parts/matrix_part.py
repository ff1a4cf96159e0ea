"""A matrix inside a stored tensor: where it lies, what it is remembered by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MatrixPart:
    """A matrix inside a tensor.

    Attributes:
        name: Of the tensor.
        shape: ``(out, in)`` of the matrix.
        start: Its first row, where it is one of several in the tensor.
        transposed: Whether the tensor holds ``(in, out)``.
        member: Its number in a stack, or None.
        step: From the beginning of a run of its rows to the next run.
        width: Rows of a run.
    """

    name: str
    shape: tuple[int, int]
    start: int = 0
    transposed: bool = False
    member: int | None = None
    step: int = 1
    width: int = 1

    @property
    def key(self) -> list[Any]:
        """What the matrix is remembered by."""
        place = [self.member, self.step, self.width]
        plain = [self.name, *self.shape, self.start, self.transposed]
        return plain if place == [None, 1, 1] else [*plain, *place]

    def draws(self) -> torch.Generator:
        """A new random generator, whose draws depend on which matrix this is alone."""
        import torch

        digest = hashlib.sha256(json.dumps(self.key).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix in a contiguous tensor: a view, or a copy where its rows come in runs."""
        return self._runs(tensor).reshape(self.shape)

    def put(self, matrix: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write the matrix to its place in a contiguous tensor."""
        runs = self._runs(tensor)
        runs.copy_(matrix.reshape(runs.shape))

    def _runs(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of its rows: a matrix, or ``(runs, width, in)``."""
        whole = tensor if self.member is None else tensor[self.member]
        matrix = whole.reshape(whole.shape[0], -1)
        rows = matrix.T if self.transposed else matrix
        if self.width > 1:
            runs = rows.reshape(-1, self.step, rows.shape[1])
            return runs[:, self.start : self.start + self.width]
        return rows[self.start : self.start + (self.shape[0] - 1) * self.step + 1 : self.step]
