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
from mergesearch.evaluators.by_item import Array, ByItem, domain_names, wide
from mergesearch.evaluators.model_items import ModelItems, padded, run_model
from mergesearch.evaluators.reduction import DomainScore
from mergesearch.evaluators.text.language_model import IGNORED
from mergesearch.evaluators.text.text_items import first_token, longest, required_tokenizer
from mergesearch.evaluators.text.tokenizers import load_tokenizer, parent_warnings
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


class Perplexity(ByItem):
    """Scores a causal language model.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        max_length: Tokens of a window; None takes what the model has room for.
        stride: Tokens from one window to the next; None means that windows do not overlap.
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
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        plain = {metric.label for metric in self._metrics if metric.metric == "log_perplexity"}
        self.additive = tuple(name for name in self.additive if name in plain)
        self._tokenizer = tokenizer
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
        self._loaded()

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about tokenizers that differ among base and experts."""
        return parent_warnings(sources, templates=False)

    def weights(self, split: Split) -> npt.NDArray[np.float64]:
        """Number of tokens of each item that count ``(items,)``, in the order of the split."""
        return np.array(
            [len(row) - 1 for row in self._items[split].inputs["input_ids"]], dtype=np.float64
        )

    def _loaded(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(
            required_tokenizer(self._tokenizer, self._where), f"{self._where}.tokenizer"
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

        tokens: Any = items.inputs["input_ids"]
        length = self._max_length or longest(model) or 2048
        stride = self._stride or length
        parts = [
            (item, window)
            for item, row in enumerate(tokens)
            for window in windows(len(row) - 1, length, min(stride, length))
        ]
        totals = []
        for start in range(0, len(parts), self._batch_size):
            batch = parts[start : start + self._batch_size]
            totals.append(self._nats(model, items, batch))
        sums = torch.cat(totals)
        owners = torch.tensor([item for item, _ in parts], device=sums.device)
        counts = torch.tensor([len(row) - 1 for row in tokens], device=sums.device)
        nats = sums.new_zeros(len(tokens)).index_add(0, owners, sums) / counts
        return {"log_perplexity": nats, "perplexity": nats}

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

    def _nats(
        self, model: Any, items: ModelItems, batch: Sequence[tuple[int, Window]]
    ) -> torch.Tensor:
        """Cross-entropy of each window's tokens that count, summed ``(windows,)``."""
        from torch.nn.functional import cross_entropy

        tokens: Any = items.inputs["input_ids"]
        read = []
        wanted = []
        for item, window in batch:
            read.append(tokens[item][window.start : window.stop])
            labels = tokens[item][window.start + 1 : window.stop + 1].clone()
            labels[: window.counted - window.start] = IGNORED
            wanted.append(labels)
        output, _ = run_model(model, ModelItems({"input_ids": read}, np.full(len(read), ""), {}))
        logits = wide(output.logits)
        targets = padded(wanted, IGNORED).to(logits.device)
        return cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        ).sum(dim=1)


def _together(score: DomainScore, tokens: Array) -> DomainScore:
    """Perplexity of all texts of a domain together, and its error to first order."""
    share = tokens / tokens.sum()
    nats = float(share @ score.items)
    value = float(np.exp(nats))
    error = value * float(np.sqrt(np.sum((share * (score.items - nats)) ** 2)))
    return replace(score, value=value, error=error, mean=False)
