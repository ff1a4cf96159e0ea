"""Classes that a model gives to the words of a text, as for names of entities.

The first token of a word answers for it. Scores are the share of right words and the cross-entropy
of an item, the macro F1 score over all words, by class, and precision, recall and F1 score of whole
spans (:mod:`mergesearch.evaluators.metrics.spans`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import domain_names, wide
from mergesearch.evaluators.data.item_files import item_files
from mergesearch.evaluators.data.split_tables import classes_of
from mergesearch.evaluators.metrics.answers import check_numbers, f1_counts, macro_f1
from mergesearch.evaluators.metrics.spans import SPAN_SCORES, check_spans, span_counts, span_parts
from mergesearch.evaluators.model_items import ModelItems, padded, run_model
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.encoding import encoded
from mergesearch.evaluators.text.text_classification import TextClassification
from mergesearch.evaluators.text.token_losses import IGNORED
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class TokenClassification(TextClassification):
    """Scores a model with one answer for each word.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``; one that knows words.
        max_length: Tokens of an item at most; words beyond do not count.
        **by_item: Arguments of :class:`ByItem`; the columns are ``words`` and ``tags``, of which
            negative ones do not count.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {"f1": macro_f1, **SPAN_SCORES}
    model_class: str | None = "AutoModelForTokenClassification"

    def check(self) -> None:
        """Check as for texts, and that the tokenizer tells which token belongs to which word.

        Raises:
            InputError: In one line.
        """
        super().check()
        if not self._loaded().is_fast:
            raise InputError(
                f"{self._where}.tokenizer: expected one with a tokenizer.json, which knows the "
                f"words of its tokens, found none in {self._tokenizer}"
            )
        if self._spans:
            check_spans(self._names, self._where)

    @property
    def _spans(self) -> list[str]:
        """Scores of spans that are wanted."""
        return sorted(self._wanted & set(SPAN_SCORES))

    @cached_property
    def _names(self) -> Mapping[str, Sequence[str]]:
        """Domain -> names of its classes; "" where one path has all."""
        column = self._columns["tags"]
        assert column is not None
        return classes_of(item_files(self._data), column, f"{self._where}.data")

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        inputs, found = encoded(
            self._loaded(), columns["words"], max_length=self._max_length, words=True
        )
        labels = []
        for index, (words, tags) in enumerate(zip(columns["words"], columns["tags"], strict=True)):
            if len(words) != len(tags):
                raise InputError(
                    f"{self._where}.data: item {index}: expected a tag for every word, received "
                    f"{len(words)} words and {len(tags)} tags"
                )
            labels.append(_first_tokens(found.word_ids(index), list(tags)))
        odd = next((n for n, row in enumerate(labels) if not bool((row != IGNORED).any())), None)
        if odd is not None:
            raise InputError(
                f"{self._where}.data: item {odd}: expected a word with a tag, received "
                f"{columns['words'][odd][:8]}"
            )
        return ModelItems(
            inputs, domain_names(columns.get("domain"), len(labels)), {"target": labels}
        )

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.functional import cross_entropy

        output, _ = run_model(model, items)
        logits = wide(output.logits)
        labels = padded(items.extra["target"], IGNORED)
        counted = labels != IGNORED
        check_numbers(labels[counted], logits.shape[2], f"{self._where}.tags")
        labels = to_device(labels, logits.device)
        counted = to_device(counted, logits.device)
        losses = cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        number = counted.sum(dim=1)
        answers = logits.argmax(dim=2)
        right = ((answers == labels) & counted).sum(dim=1).double() / number
        finite = torch.isfinite(losses).all(dim=1)
        scores = {
            "accuracy": torch.where(finite, right, torch.nan),
            "cross_entropy": losses.sum(dim=1) / number,
        }
        if "f1" in self._wanted and not torch.is_grad_enabled():
            scores |= {"f1": scores["accuracy"]}
            scores |= f1_counts("f1", answers, labels, counted, logits.shape[2])
        if self._spans and not torch.is_grad_enabled():
            scores |= self._span_scores(answers, labels, items.domains, finite)
        return scores

    def _span_scores(
        self,
        answers: torch.Tensor,
        labels: torch.Tensor,
        domains: npt.NDArray[np.str_],
        finite: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Scores of spans of each item ``(items,)``, and their parts; NaN where not ``finite``.

        Args:
            answers, labels: Class numbers ``(items, tokens)``, of which labels say what counts.
            domains: Domain of each item ``(items,)``.
            finite: Whether the answers of an item are finite ``(items,)``.
        """
        import torch

        counts = []
        rows = zip(answers.cpu(), labels.cpu(), domains.tolist(), strict=True)
        for answered, wanted, domain in rows:
            names = self._names.get(domain, self._names.get("", ()))
            numbers = [row[wanted != IGNORED].tolist() for row in (answered, wanted)]
            largest = max(map(max, numbers))
            if largest >= len(names):
                raise InputError(
                    f"{self._where}.data.classes: expected names of all classes of the model, "
                    f"received {len(names)} names and class {largest}; list all of them"
                )
            counts.append(span_counts(*([names[number] for number in row] for row in numbers)))
        parts = {n: v for metric in self._spans for n, v in span_parts(metric, counts).items()}
        return {
            name: torch.where(finite, torch.from_numpy(values).to(finite.device), torch.nan)
            for name, values in parts.items()
        }


def _first_tokens(words: list[int | None], tags: list[int]) -> torch.Tensor:
    """Tag of each token ``(tokens,)``; those that do not begin a word have none."""
    import torch

    labels = []
    before = None
    for word in words:
        begins = word is not None and word != before
        labels.append(int(tags[word]) if begins and word is not None else IGNORED)
        before = word
    return torch.tensor([label if label >= 0 else IGNORED for label in labels])
