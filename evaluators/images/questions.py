"""Questions about pictures, answered by a model of images and texts that writes.

An answer is right if it is one of those wanted, without regard to case, articles and punctuation.
Where three or more people answered, agreement with k of them scores min(k / 3, 1), as in Antol
2015, "VQA: Visual Question Answering" (arXiv 1505.00468). Writing is greedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array, ByItem, domain_names
from mergesearch.evaluators.data.pictures import opened_picture, processor_folder
from mergesearch.evaluators.model_items import generated
from mergesearch.merging import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s]")
#: People who must agree for a whole point, where that many answered.
PEOPLE = 3


@dataclass(frozen=True, eq=False)
class _Questions:
    """A split in memory.

    Attributes:
        pictures: Bytes or path of each picture.
        questions: What is asked.
        answers: Answers of people, one or more for each item.
        domains: Domain of each item ``(items,)``.
    """

    pictures: list[Any]
    questions: list[str]
    answers: list[list[str]]
    domains: npt.NDArray[np.str_]

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> _Questions:
        """The items at some indices."""
        numbers = np.arange(len(self.questions))[indices].tolist()
        return _Questions(
            [self.pictures[n] for n in numbers],
            [self.questions[n] for n in numbers],
            [self.answers[n] for n in numbers],
            self.domains[numbers],
        )


class VisualQuestions(ByItem):
    """Scores a model that answers questions about pictures.

    Args:
        processor: Folder of the processor, or ``org/name@revision``; it needs a chat template.
        max_new_tokens: Tokens of an answer at most.
        instruction: Said after every question.
        **by_item: Arguments of :class:`ByItem`; the columns are ``picture``, ``text``, and
            ``target`` or ``answers``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset()
    model_class: str | None = "AutoModelForImageTextToText"
    _subject = "written answers"

    def __init__(
        self,
        processor: str | None,
        *,
        max_new_tokens: int = 16,
        instruction: str = "",
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        self._source = processor
        self._max_new_tokens = max_new_tokens
        self._instruction = instruction

    def check(self) -> None:
        """Check as every evaluator of items, and load the processor and its chat template.

        Raises:
            InputError: In one line.
        """
        super().check()
        if not self._processor.chat_template:
            raise InputError(
                f"{self._where}.tokenizer: expected a processor with a chat template, found none "
                f"in {self._source}; add its chat_template.jinja"
            )

    @cached_property
    def _processor(self) -> Any:
        """The processor, which pads on the left."""
        from transformers import AutoProcessor

        where = f"{self._where}.tokenizer"
        folder = processor_folder(self._source, where)
        try:
            processor = AutoProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            processor.tokenizer.padding_side = "left"
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"{where}: {folder}: expected a processor of images and texts, received "
                f"{type(error).__name__}: {text}"
            ) from None
        return processor

    def _read(self, columns: Mapping[str, Any]) -> _Questions:
        wanted = columns.get("answers") or [[text] for text in columns["target"]]
        odd = next((n for n, row in enumerate(wanted) if not row or None in row), None)
        if odd is not None:
            raise InputError(
                f"{self._where}.data: item {odd}: expected an answer, received {wanted[odd]}"
            )
        questions = list(columns["text"])
        domains = domain_names(columns.get("domain"), len(questions))
        return _Questions(list(columns["picture"]), questions, list(wanted), domains)

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        written: list[str] = []
        for part in item_batches(items, self._batch_size):
            written += self._written(model, part)
        scores = [agreement(text, row) for text, row in zip(written, items.answers, strict=True)]
        return {"accuracy": np.array(scores)}

    def _written(self, model: Any, items: _Questions) -> list[str]:
        """What the model answers."""
        texts = [
            self._processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, _text(self._asked(question))]}],
                add_generation_prompt=True,
            )
            for question in items.questions
        ]
        pictures = [[opened_picture(picture)] for picture in items.pictures]
        batch = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        like = next(model.parameters())
        arguments = {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in batch.items()
        }
        rows = generated(model, arguments, self._max_new_tokens)
        new = rows[:, arguments["input_ids"].shape[1] :]
        answers: list[str] = self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def _asked(self, question: str) -> str:
        return f"{question} {self._instruction}".strip()


def agreement(answer: str, wanted: Sequence[str]) -> float:
    """Score of an answer, 0 to 1."""
    count = sum(plain(one) == plain(answer) for one in wanted)
    return min(count / (PEOPLE if len(wanted) >= PEOPLE else 1), 1.0)


def plain(answer: str) -> str:
    """An answer without case, articles and punctuation."""
    text = _PUNCTUATION.sub(" ", answer.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
