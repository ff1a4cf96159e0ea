"""Classes and numbers that a model gives to texts, or to pairs of texts.

Classes are scored by accuracy, cross-entropy and the macro F1 score; numbers, as of semantic
similarity, by squared error and by the correlations of Spearman and Pearson.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.by_item import domain_names, wide
from mergesearch.evaluators.metrics.answers import answer_scores, macro_f1
from mergesearch.evaluators.metrics.correlation import pearson, spearman
from mergesearch.evaluators.model_items import ModelItems, run_model
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.encoding import encoded
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


class TextClassification(Tokenized):
    """Scores a model with one answer for each text.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        max_length: Tokens of an item at most; None takes what the tokenizer says.
        **by_item: Arguments of :class:`ByItem`; the columns are ``text``, ``pair`` for a second
            text, and ``label`` or ``number``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy", "squared_error"})
    pooled: ClassVar[Mapping[str, Pool]] = {
        "f1": macro_f1,
        "spearman": spearman,
        "pearson": pearson,
    }
    model_class: str | None = "AutoModelForSequenceClassification"

    def __init__(
        self, tokenizer: str | None, *, max_length: int | None = None, **by_item: Any
    ) -> None:
        super().__init__(tokenizer, **by_item)
        other = "squared_error" if self._columns.get("number") is None else "cross_entropy"
        self.proxies = tuple(name for name in self.proxies if name != other)
        self._max_length = max_length

    def check(self) -> None:
        """Check as every evaluator of items, and load the tokenizer.

        Raises:
            InputError: In one line.
        """
        super().check()
        self._check_tokenizer()

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        import torch

        inputs, _ = encoded(
            self._loaded(), columns["text"], columns.get("pair"), max_length=self._max_length
        )
        numbers = self._columns.get("number") is not None
        wanted = columns["number" if numbers else "label"]
        kind = np.float32 if numbers else np.int64
        targets = torch.from_numpy(np.ascontiguousarray(wanted, dtype=kind))
        domains = domain_names(columns.get("domain"), len(targets))
        return ModelItems(inputs, domains, {"target": targets})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch

        output, _ = run_model(model, items)
        logits = wide(output.logits)
        targets = items.extra["target"]
        assert isinstance(targets, torch.Tensor)
        if self._columns.get("number") is not None:
            return self._number_scores(logits, targets)
        f1 = "f1" in self._wanted and not torch.is_grad_enabled()
        return answer_scores(logits, targets, f"{self._where}.label", f1=f1)

    def _number_scores(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Squared error of each item, and the answers and numbers that correlations need."""
        if logits.shape[1] != 1:
            raise InputError(
                f"{self._where}.number: expected a model with one answer, found one with "
                f"{logits.shape[1]} classes; name the column of classes in label"
            )
        return self._compared(logits[:, 0], to_device(targets, logits.device))

    def _compared(self, answers: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Squared error of each item ``(items,)``, and the parts of correlations."""
        numbers = numbers.to(answers.dtype)
        error = (answers - numbers) ** 2
        parts: dict[str, torch.Tensor] = {}
        for metric in sorted(self._wanted & {"spearman", "pearson"}):
            parts |= {metric: -error, f"{metric}/answer": answers, f"{metric}/number": numbers}
        return {"squared_error": error, **parts}
