"""Requests as token ids, and the rows of a batch that score them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mergesearch.merging import InputError

Tokens = tuple[int, ...]
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context; both hold at least one token."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        context: Tokens that all branches see.
        branches: Tokens after them, one branch for each continuation, without its last token.
        requests: The requests that the row scores: index of the request, index of its branch, and
            the tokens to predict.
    """

    context: Tokens
    branches: tuple[Tokens, ...]
    requests: tuple[tuple[int, int, Tokens], ...]

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.context) + sum(map(len, self.branches))

    @property
    def branching(self) -> bool:
        """Whether tokens of the row must not see each other."""
        return sum(bool(branch) for branch in self.branches) > 1


@dataclass(frozen=True)
class Options:
    """How rows are run.

    Attributes:
        batch_size: Rows of a forward pass at most.
        max_length: Tokens of a row at most; longer contexts lose their beginning.
        packed: Let continuations of one context share a row.
        padding: Side on which shorter rows are padded.
        batch_tokens: Padded tokens of a forward pass at most; None means no limit.
    """

    batch_size: int
    max_length: int
    packed: bool = False
    padding: Literal["right", "left"] = "right"
    batch_tokens: int | None = None


def rows_of(requests: Sequence[Request], options: Options) -> Iterator[Row]:
    """Yield rows for requests; those of one context or of equal tokens share a row if allowed.

    Raises:
        InputError: If a continuation is longer than a row may be.
    """
    shared: dict[Tokens, list[tuple[int, Request]]] = {}
    for index, request in enumerate(requests):
        if len(request.continuation) > options.max_length:
            raise InputError(
                f"expected continuations of at most {options.max_length} tokens, received one of "
                f"{len(request.continuation)}; set max_length, or choose a model that reads more"
            )
        # As in the harness, a row that is too long loses the beginning of its context.
        kept = options.max_length + 1 - len(request.continuation)
        shared.setdefault(request.context[-kept:], []).append((index, request))
    for context, members in shared.items():
        by_tokens: dict[Tokens, list[int]] = {}
        for index, request in members:
            by_tokens.setdefault(request.continuation, []).append(index)
        whole = _row(context, by_tokens)
        if options.packed and whole.length <= options.max_length:
            yield whole
        else:
            yield from (_row(context, {tokens: indices}) for tokens, indices in by_tokens.items())


def _row(context: Tokens, by_tokens: dict[Tokens, list[int]]) -> Row:
    """Make a row of one context from continuation -> indices of its requests."""
    targets = [
        (index, branch, tokens)
        for branch, (tokens, indices) in enumerate(by_tokens.items())
        for index in indices
    ]
    return Row(context, tuple(tokens[:-1] for tokens in by_tokens), tuple(targets))


def row_tokens(row: Row) -> list[int]:
    """The tokens that the model reads: the context, then one branch after the other."""
    return [*row.context, *(token for branch in row.branches for token in branch)]


def row_positions(row: Row) -> list[int]:
    """Position of every token; branches begin where the context ends."""
    first = len(row.context)
    return [
        *range(first),
        *(first + offset for branch in row.branches for offset in range(len(branch))),
    ]


def row_branches(row: Row) -> list[int]:
    """Number of the branch of every token, from 1; 0 in the context."""
    return [
        *(0 for _ in row.context),
        *(number for number, branch in enumerate(row.branches, 1) for _ in branch),
    ]


def branch_starts(row: Row) -> list[int]:
    """Column in which every branch begins."""
    starts = []
    column = len(row.context)
    for branch in row.branches:
        starts.append(column)
        column += len(branch)
    return starts
