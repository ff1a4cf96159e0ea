"""Perplexity of a causal language model on texts: nats per token, every token counted once.

A text is read in windows of at most ``max_length`` tokens; where windows overlap (``stride`` below
``max_length``), later ones count only the tokens that earlier ones have not, so that all but the
first window's have more context. The tokenizer's first token stands before the text, so that the
first token of the text counts too.

Of a domain, ``perplexity`` is exp(nats / tokens) over all its texts together; ``log_perplexity`` is
the mean over its texts of their nats per token, which is smooth and adds up over items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Split
from mergesearch.evaluators.batching import KeptPlans, token_batches, token_limit
from mergesearch.evaluators.by_item import Array, domain_names
from mergesearch.evaluators.model_items import ModelItems, padded
from mergesearch.evaluators.reduction import DomainScore
from mergesearch.evaluators.text.text_items import first_token, longest
from mergesearch.evaluators.text.token_losses import IGNORED, token_losses
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Window:
    """A part of a token sequence that is read at once.

    Attributes:
        start, stop: Range of the tokens that are read.
        counted: Index of the first of them whose successor counts.
    """

    start: int
    stop: int
    counted: int


def windows(count: int, length: int, stride: int) -> list[Window]:
    """Make windows over ``count`` tokens, the successor of each of which counts once."""
    made = []
    done = 0
    start = 0
    while done < count:
        stop = min(start + length, count)
        made.append(Window(start, stop, done))
        done = stop
        start = start + stride
    return made


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """How some texts are read.

    Attributes:
        batches: Input and labels ``(windows, width)`` of each forward pass.
        owners: Index of each window's text ``(windows,)``.
        counts: Number of the tokens of each text that count ``(texts,)``.
    """

    batches: tuple[tuple[ModelItems, torch.Tensor], ...]
    owners: torch.Tensor
    counts: torch.Tensor


class Perplexity(Tokenized):
    """Scores a causal language model.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        max_length: Tokens of a window; None takes what the model has room for.
        stride: Tokens from one window to the next; None means that windows do not overlap.
        batch_tokens: Padded tokens of a forward pass at most; None takes the device's limit.
        **by_item: Arguments of :class:`ByItem`; ``batch_size`` counts windows.

    Raises:
        InputError: If windows would leave tokens out.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"log_perplexity"})
    model_class: str | None = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: str | None,
        *,
        max_length: int | None = None,
        stride: int | None = None,
        batch_tokens: int | None = None,
        **by_item: Any,
    ) -> None:
        super().__init__(tokenizer, **by_item)
        self._batch_tokens = batch_tokens
        self._plans = KeptPlans[WindowPlan]()
        plain = {metric.label for metric in self._metrics if metric.metric == "log_perplexity"}
        self.additive = tuple(name for name in self.additive if name in plain)
        self._max_length = max_length
        self._stride = stride
        if max_length is not None and stride is not None and stride > max_length:
            raise InputError(
                f"{self._where}.stride: expected at most max_length ({max_length}), received "
                f"{stride}; tokens between windows would not count"
            )

    def check(self) -> None:
        """Check as every evaluator of items, and load the tokenizer.

        Raises:
            InputError: In one line.
        """
        super().check()
        self._check_tokenizer()

    def weights(self, split: Split) -> npt.NDArray[np.float64]:
        """Number of tokens of each item that count ``(items,)``, in the order of the split."""
        return np.array(
            [len(row) - 1 for row in self._items[split].inputs["input_ids"]], dtype=np.float64
        )

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        import torch

        tokenizer = self._loaded()
        texts = columns["text"]
        before = first_token(tokenizer, f"{self._where}.tokenizer")
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        empty = next((index for index, row in enumerate(rows) if not row), None)
        if empty is not None:
            raise InputError(
                f"{self._where}.data: {self._data}: expected texts of at least one token, received "
                f"{texts[empty][:40]!r} (item {empty})"
            )
        tokens = [torch.tensor([before, *row], dtype=torch.int64) for row in rows]
        return ModelItems({"input_ids": tokens}, domain_names(columns.get("domain"), len(rows)), {})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        """Nats per token of each item ``(items,)``, under the names of both metrics."""
        import torch

        plan = self._plan(model, items)
        sums = torch.cat(
            [token_losses(model, batch, labels).sum(dim=1) for batch, labels in plan.batches]
        )
        counts = to_device(plan.counts, sums.device)
        owners = to_device(plan.owners, sums.device)
        nats = sums.new_zeros(len(counts)).index_add(0, owners, sums) / counts
        return {"log_perplexity": nats, "perplexity": nats}

    def _plan(self, model: Any, items: ModelItems) -> WindowPlan:
        """How these texts are read; worked out once for each choice of texts."""
        tokens: Any = items.inputs["input_ids"]
        length = self._max_length or longest(model) or 2048
        stride = min(self._stride or length, length)
        rows = self._batch_size
        device = next(model.parameters()).device.type
        limit = token_limit(self._batch_tokens, device, self._halvings)
        return self._plans.get(
            tokens,
            (length, stride, rows, limit),
            lambda: _window_plan(tokens, length, stride, rows, limit),
        )

    def _by_domain(
        self,
        metric: str,
        split: Split,
        indices: npt.NDArray[np.intp],
        scores: Array,
        domains: npt.NDArray[np.str_],
    ) -> dict[str, DomainScore]:
        """Domain -> score: the mean of items for the logarithm, else that of all texts together.

        Items are in nats per token for both metrics.
        """
        by_domain = super()._by_domain(metric, split, indices, scores, domains)
        if metric != "perplexity":
            return by_domain
        tokens = self.weights(split)
        return {
            name: _together(score, tokens[score.item_indices]) for name, score in by_domain.items()
        }


def _window_plan(
    tokens: Sequence[torch.Tensor], length: int, stride: int, rows: int, limit: int | None
) -> WindowPlan:
    """Divide texts ``(tokens,)`` into windows, and these into batches, in their order."""
    import torch

    parts = [
        (item, window)
        for item, row in enumerate(tokens)
        for window in windows(len(row) - 1, length, stride)
    ]
    lengths = [window.stop - window.start for _, window in parts]
    with torch.inference_mode(False):  # a plan serves gradients too
        return WindowPlan(
            tuple(_batch(tokens, parts[one]) for one in token_batches(lengths, rows, limit)),
            torch.tensor([item for item, _ in parts]),
            torch.tensor([len(row) - 1 for row in tokens]),
        )


def _batch(
    tokens: Sequence[torch.Tensor], parts: Sequence[tuple[int, Window]]
) -> tuple[ModelItems, torch.Tensor]:
    """Input of some windows, and labels ``(windows, width)`` of their tokens that count."""
    read = []
    wanted = []
    for item, window in parts:
        read.append(tokens[item][window.start : window.stop])
        labels = tokens[item][window.start + 1 : window.stop + 1].clone()
        labels[: window.counted - window.start] = IGNORED
        wanted.append(labels)
    return ModelItems({"input_ids": read}, np.full(len(read), ""), {}), padded(wanted, IGNORED)


def _together(score: DomainScore, tokens: Array) -> DomainScore:
    """Perplexity of all texts of a domain together, and its error to first order."""
    share = tokens / tokens.sum()
    nats = float(share @ score.items)
    value = float(np.exp(nats))
    error = value * float(np.sqrt(np.sum((share * (score.items - nats)) ** 2)))

    def value_of(rows: npt.NDArray[np.intp]) -> float:
        return float(np.exp(tokens[rows] @ score.items[rows] / tokens[rows].sum()))

    return replace(score, value=value, error=error, mean=False, value_of=value_of)
