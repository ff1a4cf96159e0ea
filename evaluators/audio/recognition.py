"""Word and character error rates of a speech recogniser, on audio that is arrays of numbers.

Models of connectionist temporal classification answer with their most likely token at each moment,
encoder-decoders write greedily. Rates are means over recordings; those of a whole corpus weigh long
recordings more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.by_item import Array, ByItem
from mergesearch.evaluators.metrics.libraries import check_library
from mergesearch.evaluators.metrics.written import WRITTEN
from mergesearch.evaluators.model_items import ModelItems, read_items, run_model
from mergesearch.evaluators.text.text_items import required_tokenizer
from mergesearch.evaluators.text.tokenizers import load_tokenizer, parent_warnings
from mergesearch.merging import InputError, MergesearchError

if TYPE_CHECKING:
    import torch

#: The auto class of models that answer at every moment.
CTC = "AutoModelForCTC"


@dataclass(frozen=True, eq=False)
class _Recordings:
    """Recordings and what is said in them.

    Attributes:
        model: Inputs of the model.
        wanted: What is said.
    """

    model: ModelItems
    wanted: list[str]

    @property
    def domains(self) -> npt.NDArray[np.str_]:
        """Domain of each item ``(items,)``."""
        return self.model.domains

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> _Recordings:
        """The items at some indices."""
        numbers = np.arange(len(self.wanted))[indices].tolist()
        wanted = [self.wanted[number] for number in numbers]
        return replace(self, model=self.model.rows(indices), wanted=wanted)


class SpeechRecognition(ByItem):
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

    def __init__(
        self,
        tokenizer: str | None,
        model_class: str,
        *,
        max_new_tokens: int = 128,
        ignore_case: bool = True,
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        self.model_class = model_class
        self._tokenizer = tokenizer
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

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about tokenizers that differ among base and experts."""
        return parent_warnings(sources, templates=False)

    def _loaded(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(
            required_tokenizer(self._tokenizer, self._where), f"{self._where}.tokenizer"
        )

    def _read(self, columns: Mapping[str, Any]) -> Any:
        wanted = columns["target"]
        if not all(wanted):
            raise InputError(f"{self._where}.text: expected a text for every item, received none")
        inputs = {name: values for name, values in columns.items() if name != "target"}
        return _Recordings(read_items(inputs, self._where), list(wanted))

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch

        written: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(items.wanted), self._batch_size):
                part = items.rows(slice(start, start + self._batch_size))
                written += self._written(model, part.model)
        pairs = [
            (self._plain(text), self._plain(wanted))
            for text, wanted in zip(written, items.wanted, strict=True)
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
        rows = model.generate(
            **items.arguments(model),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        written: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return written

    def _scores(self, model: Any, items: Any) -> dict[str, torch.Tensor]:
        """Refuse to give gradients: error rates have none.

        Raises:
            MergesearchError: Always.
        """
        raise MergesearchError(f"{self._where}: expected no gradients of error rates")
