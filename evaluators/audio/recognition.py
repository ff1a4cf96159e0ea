"""Word and character error rates of a speech recogniser, on audio that is arrays of numbers.

Models of connectionist temporal classification answer with their most likely token at each moment,
encoder-decoders write greedily. Rates are means over recordings; those of a whole corpus weigh long
recordings more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array
from mergesearch.evaluators.metrics.libraries import check_library
from mergesearch.evaluators.metrics.written import WRITTEN
from mergesearch.evaluators.model_items import ModelItems, generated, read_items, run_model
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.merging import InputError

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

    smooth: ClassVar[frozenset[str]] = frozenset()
    _subject = "error rates"

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
        check_library("nltk", f"{self._where}.objectives")
        self._loaded()

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        wanted = columns["target"]
        if not all(wanted):
            raise InputError(f"{self._where}.text: expected a text for every item, received none")
        inputs = {name: values for name, values in columns.items() if name != "target"}
        return replace(read_items(inputs, self._where), extra={"wanted": list(wanted)})

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch

        written: list[str] = []
        with torch.inference_mode():
            for part in item_batches(items, self._batch_size):
                written += self._written(model, part)
        pairs = [
            (self._plain(text), self._plain(wanted))
            for text, wanted in zip(written, items.extra["wanted"], strict=True)
        ]
        return {
            metric: np.array([WRITTEN[metric][0](text, wanted) for text, wanted in pairs])
            for metric in sorted(self._wanted)
        }

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
