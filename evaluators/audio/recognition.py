"""Word and character error rates of a speech recogniser, on audio that is arrays of numbers.

Models of connectionist temporal classification answer with their most likely token at each moment,
encoder-decoders write greedily. Rates are means over recordings; those of a whole corpus weigh long
recordings more. The cross-entropy of the text has gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.audio.text_losses import (
    alignment_losses,
    forced_losses,
    known_tokens,
)
from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array
from mergesearch.evaluators.metrics.libraries import check_library
from mergesearch.evaluators.metrics.written import WRITTEN
from mergesearch.evaluators.model_items import ModelItems, generated, read_items, run_model
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: The auto class of models that answer at every moment.
CTC = "AutoModelForCTC"


class SpeechRecognition(Tokenized):
    """Scores a speech recogniser.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        model_class: ``AutoModelForCTC`` or ``AutoModelForSpeechSeq2Seq``.
        max_new_tokens: Tokens that an encoder-decoder writes at most.
        ignore_case: Whether upper and lower case are the same.
        **by_item: Arguments of :class:`ByItem`; the columns are arguments of the model, such as
            ``input_values``, and ``target``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})

    def __init__(
        self,
        tokenizer: str | None,
        model_class: str,
        *,
        max_new_tokens: int = 128,
        ignore_case: bool = True,
        **by_item: Any,
    ) -> None:
        super().__init__(tokenizer, **by_item)
        self.model_class = model_class
        self._max_new_tokens = max_new_tokens
        self._ignore_case = ignore_case

    def check(self) -> None:
        """Check as every evaluator of items, and find the tokenizer and the metrics' library.

        Raises:
            InputError: In one line.
        """
        super().check()
        for metric in sorted(self._wanted & {"wer", "cer"}):
            check_library("nltk", f"{self._where}.objectives: {metric}")
        self._loaded()

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        wanted = columns["target"]
        if not all(wanted):
            raise InputError(f"{self._where}.text: expected a text for every item, received none")
        inputs = {name: values for name, values in columns.items() if name != "target"}
        extra = {"wanted": list(wanted), "labels": self._tokens(wanted)}
        return replace(read_items(inputs, self._where), extra=extra)

    def _tokens(self, wanted: Sequence[str]) -> list[torch.Tensor]:
        """Tokens of each text ``(tokens,)``, for its cross-entropy."""
        import torch

        tokenizer = self._loaded()
        if self.model_class != CTC:
            rows = tokenizer(text_target=list(wanted), verbose=False)["input_ids"]
            return [torch.tensor(row, dtype=torch.int64) for row in rows]
        labels = [known_tokens(tokenizer, t, ignore_case=self._ignore_case) for t in wanted]
        unknown = next((n for n, row in enumerate(labels) if not len(row)), None)
        if unknown is not None and "cross_entropy" in self._wanted:
            raise InputError(
                f"{self._where}.text: expected texts in letters that the tokenizer knows, received "
                f"{wanted[unknown]!r}; spell them as the model was trained"
            )
        return labels

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``, of texts that are written if need be."""
        import torch

        scores = super()._item_scores(model, items) if "cross_entropy" in self._wanted else {}
        metrics = sorted(self._wanted & set(WRITTEN))
        if not metrics:
            return scores
        written: list[str] = []
        with torch.inference_mode():
            for part in item_batches(items, self._batch_size):
                written += self._written(model, part)
        pairs = [
            (self._plain(text), self._plain(wanted))
            for text, wanted in zip(written, items.extra["wanted"], strict=True)
        ]
        for metric in metrics:
            score, _ = WRITTEN[metric]
            scores[metric] = np.array([score(text, wanted) for text, wanted in pairs])
        return scores

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        targets = items.extra["labels"]
        assert isinstance(targets, list)
        if self.model_class == CTC:
            # A text that does not fit must not stop a study that does not measure this loss.
            lenient = "cross_entropy" not in self._wanted
            losses = alignment_losses(model, items, targets, self._where, lenient=lenient)
            return {"cross_entropy": losses}
        return {"cross_entropy": forced_losses(model, items, targets)}

    def _plain(self, text: str) -> str:
        return text.lower() if self._ignore_case else text

    def _written(self, model: Any, items: ModelItems) -> list[str]:
        """What the model hears in each recording."""
        tokenizer = self._loaded()
        if self.model_class == CTC:
            logits = run_model(model, items)[0].logits
            texts: list[str] = tokenizer.batch_decode(logits.argmax(dim=-1))
            return texts
        rows = generated(model, items.arguments(model), self._max_new_tokens)
        written: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return written
