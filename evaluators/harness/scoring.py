"""Log-likelihoods of many short continuations at the cost of the forward passes alone.

What is scored is frozen: token ids in, numbers out. Rows are sorted by length and padded together;
logits are made at the positions that are scored and nowhere else; continuations of one context may
share a row, each seeing the context and itself alone, so that the context is run through the model
once (tree attention as in Miao 2024, "SpecInfer").

Numbers are those of the language-model evaluation harness, up to rounding: the sum of
log-probabilities of the continuation's tokens, and whether each of them is the most likely one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators.by_item import wide
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

Tokens = tuple[int, ...]
Answer = tuple[float, bool]

#: How far sums of log-probabilities of a packed and a plain row may differ for packing to be
#: trusted, by precision.
TRUSTED = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


@dataclass(frozen=True)
class Request:
    """Score ``continuation`` after ``context``; both hold at least one token."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        context: Tokens that all branches see.
        branches: Tokens after them, one branch for each continuation, without its last token.
        requests: What is scored: place of the request, of its branch, and its tokens to predict.
    """

    context: Tokens
    branches: tuple[Tokens, ...]
    requests: tuple[tuple[int, int, Tokens], ...]

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.context) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Options:
    """How rows are run.

    Attributes:
        batch_size: Rows of a forward pass.
        max_length: Tokens of a row at most; longer contexts lose their beginning.
        packed: Let continuations of one context share a row.
        padding: Side on which shorter rows are filled up.
    """

    batch_size: int
    max_length: int
    packed: bool = False
    padding: Literal["right", "left"] = "right"


def score_requests(model: Any, requests: Sequence[Request], options: Options) -> list[Answer]:
    """Sum of log-probabilities, and whether the continuation is the most likely one, of every
    request.

    Raises:
        InputError: If a continuation is longer than a row may be.
    """
    import torch

    answers: list[Answer] = [(0.0, False)] * len(requests)
    rows = sorted(_rows(requests, options), key=lambda row: row.length, reverse=True)
    with torch.inference_mode():
        for start in range(0, len(rows), options.batch_size):
            for place, answer in _answers(
                model, rows[start : start + options.batch_size], options.padding
            ):
                answers[place] = answer
    return answers


def can_pack(model: Any, requests: Sequence[Request], options: Options) -> bool:
    """Whether rows that share a context score as rows of their own do, tried on ``requests``.

    Models whose layers do not take a mask of their own, or that see other tokens than attention
    shows them, do not.
    """
    import torch

    window = getattr(model.config.get_text_config(), "sliding_window", None)
    packed = Options(options.batch_size, options.max_length, packed=True)
    rows = list(_rows(requests, packed))
    if all(len(row.branches) < 2 for row in rows) or (
        window and max(row.length for row in rows) > window
    ):
        return False
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    plain = score_requests(model, requests, Options(options.batch_size, options.max_length))
    try:
        shared = score_requests(model, requests, packed)
    except (RuntimeError, TypeError, ValueError, IndexError, torch.cuda.OutOfMemoryError):
        return False
    return all(
        abs(one - two) <= TRUSTED[dtype] for (one, _), (two, _) in zip(plain, shared, strict=True)
    )


def _rows(requests: Sequence[Request], options: Options) -> Iterator[Row]:
    """Requests as rows; those of one context, or of equal tokens, share one where they may."""
    shared: dict[Tokens, list[tuple[int, Request]]] = {}
    for place, request in enumerate(requests):
        if len(request.continuation) > options.max_length:
            raise InputError(
                f"expected continuations of at most {options.max_length} tokens, received one of "
                f"{len(request.continuation)}; set max_length, or choose a model that reads more"
            )
        # As the harness: the beginning goes where context and continuation are too long.
        kept = options.max_length + 1 - len(request.continuation)
        shared.setdefault(request.context[-kept:], []).append((place, request))
    for context, members in shared.items():
        by_tokens: dict[Tokens, list[int]] = {}
        for place, request in members:
            by_tokens.setdefault(request.continuation, []).append(place)
        whole = _row(context, by_tokens)
        if options.packed and whole.length <= options.max_length:
            yield whole
        else:
            yield from (_row(context, {tokens: places}) for tokens, places in by_tokens.items())


def _row(context: Tokens, by_tokens: dict[Tokens, list[int]]) -> Row:
    targets = [
        (place, branch, tokens)
        for branch, (tokens, ps) in enumerate(by_tokens.items())
        for place in ps
    ]
    return Row(context, tuple(tokens[:-1] for tokens in by_tokens), tuple(targets))


def _answers(model: Any, rows: Sequence[Row], padding: str) -> Iterator[tuple[int, Answer]]:
    """Place and answer of every request of a batch."""
    import torch

    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    places = torch.zeros(len(rows), width, dtype=torch.int64)
    lines: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    for line, row in enumerate(rows):
        shift = width - row.length if padding == "left" else 0
        ids[line, shift : shift + row.length] = torch.tensor(
            [*row.context, *(t for b in row.branches for t in b)]
        )
        places[line, shift : shift + row.length] = torch.tensor(_positions(row))
        starts = _starts(row)
        for place, branch, tokens in row.requests:
            # The first token is predicted by the context's last one, the others by the branch.
            at = [len(row.context) - 1, *range(starts[branch], starts[branch] + len(tokens) - 1)]
            lines += [line] * len(tokens)
            columns += [shift + column for column in at]
            targets += tokens
            owners.append((place, len(tokens)))
    arguments: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    branching = any(len([branch for branch in row.branches if branch]) > 1 for row in rows)
    if branching or padding == "left":
        arguments["position_ids"] = places.to(device)
    if branching:
        arguments["attention_mask"] = _tree_mask(rows, width, padding, dtype).to(device)
    elif padding == "left":
        lengths = torch.tensor([[row.length] for row in rows])
        arguments["attention_mask"] = (
            (torch.arange(width)[None] >= width - lengths).long().to(device)
        )
    logits = wide(_logits_at(model, arguments, torch.tensor(lines), torch.tensor(columns)))
    wanted = torch.tensor(targets, device=device)
    chances = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    best = logits.argmax(dim=-1) == wanted
    sizes = [size for _, size in owners]
    parts = torch.split(chances, sizes), torch.split(best, sizes)
    for (place, _), one, right in zip(owners, *parts, strict=True):
        yield place, (float(one.sum()), bool(right.all()))


def _positions(row: Row) -> list[int]:
    """Position of every token: branches begin where the context ends."""
    first = len(row.context)
    return [
        *range(first),
        *(first + place for branch in row.branches for place in range(len(branch))),
    ]


def _starts(row: Row) -> list[int]:
    """Column where every branch begins."""
    starts = []
    column = len(row.context)
    for branch in row.branches:
        starts.append(column)
        column += len(branch)
    return starts


def _tree_mask(rows: Sequence[Row], width: int, padding: str, dtype: torch.dtype) -> torch.Tensor:
    """What every token sees, added to attention scores: ``(rows, 1, width, width)``, 0 or as low as
    can be.
    """
    import torch

    seen = torch.zeros(len(rows), width, width, dtype=torch.bool)
    seen.diagonal(dim1=1, dim2=2).fill_(
        True
    )  # padding sees itself: a row that sees nothing would be NaN
    for line, row in enumerate(rows):
        shift = width - row.length if padding == "left" else 0
        end = shift + len(row.context)
        seen[line, shift:end, shift:end] = (
            torch.ones(len(row.context), len(row.context)).tril().bool()
        )
        for start, branch in zip(_starts(row), row.branches, strict=True):
            first = shift + start
            last = shift + start + len(branch)
            seen[line, first:last, shift:end] = True
            seen[line, first:last, first:last] = torch.ones(len(branch), len(branch)).tril().bool()
    mask = torch.zeros(len(rows), 1, width, width, dtype=dtype)
    return mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)


def _logits_at(
    model: Any, arguments: dict[str, Any], lines: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Logits ``(n, vocabulary)`` at chosen places: the head is given those alone, whatever the
    model does after it.
    """
    head = model.get_output_embeddings()
    size = arguments["input_ids"].shape
    lines = lines.to(arguments["input_ids"].device)
    columns = columns.to(arguments["input_ids"].device)
    chosen = False

    def choose(module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal chosen
        chosen = given[0].shape[:2] == size
        return (given[0][lines, columns][None], *given[1:]) if chosen else None

    hook = None if head is None else head.register_forward_pre_hook(choose)
    try:
        logits: torch.Tensor = model(**arguments).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if chosen else logits[lines, columns]
