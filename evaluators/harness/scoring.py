"""Log-likelihoods of many short continuations at the cost of the forward passes alone.

Requests hold token ids. Rows are sorted by length and padded together; logits are computed at the
positions that are scored and nowhere else; continuations of one context may share a row, each
seeing the context and itself alone, so that the context is run through the model once (tree
attention as in Miao 2024, "SpecInfer").

Numbers are those of the language-model evaluation harness, up to rounding: the sum of
log-probabilities of the continuation's tokens, and whether each of them is the most likely one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Options:
    """How rows are run.

    Attributes:
        batch_size: Rows of a forward pass.
        max_length: Tokens of a row at most; longer contexts lose their beginning.
        packed: Let continuations of one context share a row.
        padding: Side on which shorter rows are padded.
    """

    batch_size: int
    max_length: int
    packed: bool = False
    padding: Literal["right", "left"] = "right"


def score_requests(model: Any, requests: Sequence[Request], options: Options) -> list[Answer]:
    """Score every request: sum of log-probabilities, and whether every token is the likeliest.

    Raises:
        InputError: If a continuation is longer than a row may be.
    """
    import torch

    answers: list[Answer] = [(0.0, False)] * len(requests)
    rows = sorted(_rows(requests, options), key=lambda row: row.length, reverse=True)
    with torch.inference_mode():
        for start in range(0, len(rows), options.batch_size):
            part = rows[start : start + options.batch_size]
            for index, answer in _answers(model, part, options.padding):
                answers[index] = answer
    return answers


def can_pack(model: Any, requests: Sequence[Request], options: Options) -> bool:
    """Try on ``requests`` whether packed rows give the same scores as plain ones.

    They do not in models whose layers take no mask of ours, or see other tokens than attention
    shows them.
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
    """Yield rows for requests; those of one context or of equal tokens share a row if allowed."""
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
        starts = _starts(row)
        for index, branch, tokens in row.requests:
            # The first token is predicted by the context's last one, the others by the branch.
            at = [len(row.context) - 1, *range(starts[branch], starts[branch] + len(tokens) - 1)]
            self.lines += [line] * len(tokens)
            self.columns += [shift + column for column in at]
            self.tokens += tokens
            self.requests.append((index, len(tokens)))


def _answers(model: Any, rows: Sequence[Row], padding: str) -> Iterator[tuple[int, Answer]]:
    """Yield the index and the answer of every request of a batch."""
    import torch

    device = next(model.parameters()).device
    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = _Targets()
    for line, row in enumerate(rows):
        shift = width - row.length if padding == "left" else 0
        ids[line, shift : shift + row.length] = torch.tensor(
            [*row.context, *(t for b in row.branches for t in b)]
        )
        positions[line, shift : shift + row.length] = torch.tensor(_positions(row))
        targets.add(line, row, shift)
    arguments = {
        "input_ids": ids.to(device),
        "use_cache": False,
        **_attention_arguments(model, rows, positions, padding),
    }
    logits = wide(
        _logits_at(model, arguments, torch.tensor(targets.lines), torch.tensor(targets.columns))
    )
    wanted = torch.tensor(targets.tokens, device=device)
    log_p = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    likeliest = logits.argmax(dim=-1) == wanted
    sizes = [size for _, size in targets.requests]
    parts = torch.split(log_p, sizes), torch.split(likeliest, sizes)
    for (index, _), one, right in zip(targets.requests, *parts, strict=True):
        yield index, (float(one.sum()), bool(right.all()))


def _attention_arguments(
    model: Any, rows: Sequence[Row], positions: torch.Tensor, padding: str
) -> dict[str, torch.Tensor]:
    """Positions and mask, where rows have branches or are padded on their left."""
    import torch

    parameter = next(model.parameters())
    width = positions.shape[1]
    branching = any(len([branch for branch in row.branches if branch]) > 1 for row in rows)
    arguments = {}
    if branching or padding == "left":
        arguments["position_ids"] = positions.to(parameter.device)
    if branching:
        mask = _tree_mask(rows, width, padding, parameter.dtype)
        arguments["attention_mask"] = mask.to(parameter.device)
    elif padding == "left":
        lengths = torch.tensor([[row.length] for row in rows])
        mask = (torch.arange(width)[None] >= width - lengths).long()
        arguments["attention_mask"] = mask.to(parameter.device)
    return arguments


def _positions(row: Row) -> list[int]:
    """Position of every token; branches begin where the context ends."""
    first = len(row.context)
    return [
        *range(first),
        *(first + offset for branch in row.branches for offset in range(len(branch))),
    ]


def _starts(row: Row) -> list[int]:
    """Column in which every branch begins."""
    starts = []
    column = len(row.context)
    for branch in row.branches:
        starts.append(column)
        column += len(branch)
    return starts


def _tree_mask(rows: Sequence[Row], width: int, padding: str, dtype: torch.dtype) -> torch.Tensor:
    """Mask of what every token sees, to be added to attention scores.

    Returns:
        ``(rows, 1, width, width)``: 0, or the lowest number of ``dtype``.
    """
    import torch

    seen = torch.zeros(len(rows), width, width, dtype=torch.bool)
    # Padding sees itself: a token that sees nothing would be NaN.
    seen.diagonal(dim1=1, dim2=2).fill_(True)
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
    """Logits ``(n, vocabulary)`` at chosen lines and columns of the batch.

    The head is given these positions alone, whatever the model does after it.
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
