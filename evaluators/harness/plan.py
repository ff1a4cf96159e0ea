"""What is worked out once to score some requests, and kept on the model's device.

Batches hold everything that the model reads. Masks of packed rows are by far the largest part,
``width²`` numbers a row; they are made on the device from the number of each token's branch, and
kept while there is room for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.batching import token_batches
from mergesearch.evaluators.harness.rows import (
    Options,
    Request,
    Row,
    branch_starts,
    row_branches,
    row_positions,
    row_tokens,
    rows_of,
)
from mergesearch.evaluators.text.token_scores import Wanted
from mergesearch.evaluators.transfer import to_device

if TYPE_CHECKING:
    import torch

#: Memory for the masks of all plans that are kept, in bytes.
MASK_BYTES = 256 * 2**20
#: Branch of padding, which sees itself alone.
PADDING = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass, on the model's device.

    Attributes:
        arguments: Arguments of the model; a packed mask that is not kept is not among them.
        branches: Number of each token's branch ``(rows, width)``, where the mask is not kept.
        wanted: The tokens that are scored.
    """

    arguments: dict[str, Any]
    branches: torch.Tensor | None
    wanted: Wanted

    def model_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the model, with a mask of ``dtype`` where rows are packed."""
        if self.branches is None:
            return self.arguments
        return self.arguments | {"attention_mask": tree_mask(self.branches, dtype)}


@dataclass(frozen=True, eq=False)
class ScoringPlan:
    """How requests are scored.

    Attributes:
        batches: The forward passes.
        requests: Index of each request and the number of its tokens, in the batches' order.
        mask_bytes: Memory of the masks that are kept.
    """

    batches: tuple[Batch, ...]
    requests: tuple[tuple[int, int], ...]
    mask_bytes: int


@dataclass
class _Targets:
    """The tokens that a batch predicts, in the order of the requests.

    Attributes:
        lines, columns: Where each of them is predicted in the batch.
        tokens: The tokens.
        requests: Index of each request, and the number of its tokens.
    """

    lines: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    requests: list[tuple[int, int]] = field(default_factory=list)

    def add(self, line: int, row: Row, shift: int) -> None:
        """Add the tokens of a row that is padded by ``shift`` on its left."""
        starts = branch_starts(row)
        for index, branch, tokens in row.requests:
            # The first token is predicted by the context's last one, the others by the branch.
            at = [len(row.context) - 1, *range(starts[branch], starts[branch] + len(tokens) - 1)]
            self.lines += [line] * len(tokens)
            self.columns += [shift + column for column in at]
            self.tokens += tokens
            self.requests.append((index, len(tokens)))

    def wanted(self, device: torch.device) -> Wanted:
        """The same on a device."""
        import torch

        parts = (self.lines, self.columns, self.tokens)
        return Wanted(*(to_device(torch.tensor(part), device) for part in parts))


def make_plan(
    model: Any, requests: Sequence[Request], options: Options, mask_room: int = MASK_BYTES
) -> ScoringPlan:
    """Work out how requests are scored on a model's device.

    Args:
        model: The model.
        requests: The requests.
        options: How rows are run.
        mask_room: Memory for masks that are kept, in bytes.

    Raises:
        InputError: If a continuation is longer than a row may be.
    """
    like = next(model.parameters())
    rows = sorted(rows_of(requests, options), key=lambda row: row.length, reverse=True)
    lengths = [row.length for row in rows]
    batches: list[Batch] = []
    answered: list[tuple[int, int]] = []
    kept = 0
    for part in token_batches(lengths, options.batch_size, options.batch_tokens):
        size = len(rows[part]) * lengths[part.start] ** 2 * like.dtype.itemsize
        batch, own = _batch(rows[part], options.padding, like, kept + size <= mask_room)
        kept += size if "attention_mask" in batch.arguments and _branching(rows[part]) else 0
        batches.append(batch)
        answered += own
    return ScoringPlan(tuple(batches), tuple(answered), kept)


def _batch(
    rows: Sequence[Row], padding: str, like: torch.Tensor, keep_mask: bool
) -> tuple[Batch, list[tuple[int, int]]]:
    """Make a forward pass over some rows, and list its requests with their lengths."""
    width = max(row.length for row in rows)
    targets = _Targets()
    shifts = [width - row.length if padding == "left" else 0 for row in rows]
    for line, (row, shift) in enumerate(zip(rows, shifts, strict=True)):
        targets.add(line, row, shift)
    device = like.device
    ids = to_device(_filled([row_tokens(row) for row in rows], shifts, width, 0), device)
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    branches = None
    if padding == "left" or _branching(rows):
        positions = _filled([row_positions(row) for row in rows], shifts, width, 0)
        arguments["position_ids"] = to_device(positions, device)
    if _branching(rows):
        numbers = _filled([row_branches(row) for row in rows], shifts, width, PADDING)
        branches = to_device(numbers, device)
    elif padding == "left":
        ones = _filled([[1] * row.length for row in rows], shifts, width, 0)
        arguments["attention_mask"] = to_device(ones, device)
    if branches is not None and keep_mask:
        arguments["attention_mask"] = tree_mask(branches, like.dtype)
        branches = None
    return Batch(arguments, branches, targets.wanted(device)), targets.requests


def _branching(rows: Sequence[Row]) -> bool:
    return any(row.branching for row in rows)


def _filled(
    parts: Sequence[Sequence[int]], shifts: Sequence[int], width: int, value: int
) -> torch.Tensor:
    """Numbers of each row ``(rows, width)``, moved to the right and padded with ``value``."""
    import torch

    filled = torch.full((len(parts), width), value, dtype=torch.int64)
    for line, (part, shift) in enumerate(zip(parts, shifts, strict=True)):
        filled[line, shift : shift + len(part)] = torch.tensor(part)
    return filled


def tree_mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mask of what every token sees, to be added to attention scores.

    A token sees the context before it and what comes before it in its own branch.

    Args:
        branches: Number of each token's branch ``(rows, width)``: 0 in the context, and
            :data:`PADDING`.
        dtype: Of the mask.

    Returns:
        ``(rows, 1, width, width)``: 0, or the lowest number of ``dtype``.
    """
    import torch

    own = branches[:, :, None]
    other = branches[:, None, :]
    seen = ((own == other) | (other == 0)) & (own >= 0)
    seen = seen.tril_()
    # Padding sees itself: a token that sees nothing would be NaN.
    seen.diagonal(dim1=1, dim2=2).fill_(True)
    rows, width = branches.shape
    mask = torch.zeros(rows, 1, width, width, dtype=dtype, device=branches.device)
    return mask.masked_fill_(seen.logical_not_()[:, None], torch.finfo(dtype).min)
