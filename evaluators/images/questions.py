"""Questions about pictures, answered by a model of images and texts that writes.

An answer is right if it is one of those wanted, without regard to case, articles and punctuation.
Where three or more people answered, agreement with k of them scores min(k / 3, 1), as in Antol
2015, "VQA: Visual Question Answering" (arXiv 1505.00468). Writing is greedy. The
cross-entropy of the commonest answer has gradients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array, ByItem, domain_names
from mergesearch.evaluators.data.pictures import opened_picture, processor_folder
from mergesearch.evaluators.images.answer_losses import answer_losses, said, taught
from mergesearch.evaluators.model_items import generated
from mergesearch.evaluators.text.token_losses import target_losses
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.tokenizer_folder import check_words

if TYPE_CHECKING:
    import torch

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
        processor: Folder of the processor, or ``org/name@revision``; without a prompt it needs a
            chat template.
        max_new_tokens: Tokens of an answer at most.
        instruction: Said after every question.
        prompt: Text with ``{}`` for the question, for a model whose processor has no chat template.
        **by_item: Arguments of :class:`ByItem`; the columns are ``picture``, ``text``, and
            ``target`` or ``answers``.
    """

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    model_class: str | None = "AutoModelForImageTextToText"

    def __init__(
        self,
        processor: str | None,
        *,
        max_new_tokens: int = 16,
        instruction: str = "",
        prompt: str | None = None,
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        self._prompt = prompt
        self._source = processor
        self._max_new_tokens = max_new_tokens
        self._instruction = instruction

    def check(self) -> None:
        """Check as every evaluator of items, and load the processor and its chat template.

        Raises:
            InputError: In one line.
        """
        super().check()
        template = self._processor.chat_template
        if self._prompt is not None:
            self.proxies = ()
            return
        if not template:
            raise InputError(
                f"{self._where}.tokenizer: expected a processor with a chat template, found none "
                f"in {self._source}; add its chat_template.jinja, or set {self._where}.prompt"
            )
        try:
            taught(self._processor, "Is it?", "It is.", self._where)
        except InputError:
            if "cross_entropy" in self._wanted:
                raise
            self.proxies = ()

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
            hint = "" if find_spec("torchvision") else "; those for videos too need torchvision"
            raise InputError(
                f"{where}: {folder}: expected a processor of images and texts, received "
                f"{type(error).__name__}: {text}{hint}"
            ) from None
        check_words(processor.tokenizer, folder, f"{where}: {folder}")
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
        """Metric -> score of each item ``(items,)``, of answers that are written if need be."""
        scores = super()._item_scores(model, items) if "cross_entropy" in self._wanted else {}
        if "accuracy" in self._wanted:
            written: list[str] = []
            for part in item_batches(items, self._batch_size):
                written += self._written(model, part)
            pairs = zip(written, items.answers, strict=True)
            scores["accuracy"] = np.array([agreement(text, row) for text, row in pairs])
        return scores

    def _scores(self, model: Any, items: _Questions) -> dict[str, torch.Tensor]:
        import torch

        answers = [commonest(row) for row in items.answers]
        if getattr(model.config, "is_encoder_decoder", False):
            rows = self._processor.tokenizer(text_target=answers)["input_ids"]
            targets = [torch.tensor(row, dtype=torch.int64) for row in rows]
            return {"cross_entropy": target_losses(model, self._read_by(model, items), targets)}
        asked = map(self._asked, items.questions)
        pairs = [
            taught(self._processor, question, answer, self._where)
            for question, answer in zip(asked, answers, strict=True)
        ]
        arguments = self._arguments(model, [text for text, _ in pairs], items.pictures, "right")
        return {"cross_entropy": answer_losses(model, arguments, [count for _, count in pairs])}

    def _written(self, model: Any, items: _Questions) -> list[str]:
        """What the model answers."""
        import torch

        arguments = self._read_by(model, items)
        rows = generated(model, arguments, self._max_new_tokens)
        asked = arguments["input_ids"]
        # An encoder-decoder does not repeat what it was asked.
        repeated = torch.equal(rows[:, : asked.shape[1]], asked)
        new = rows[:, asked.shape[1] :] if repeated else rows
        answers: list[str] = self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def _read_by(self, model: Any, items: _Questions) -> dict[str, torch.Tensor]:
        """Inputs of the model for questions without answers."""
        texts = [self._said(self._asked(question)) for question in items.questions]
        return self._arguments(model, texts, items.pictures, "left")

    def _said(self, question: str) -> str:
        """A question as the model reads it."""
        if self._prompt is not None:
            return self._prompt.format(question)
        return said(self._processor, question)

    def _arguments(
        self, model: Any, texts: Sequence[str], pictures: Sequence[Any], side: str
    ) -> dict[str, torch.Tensor]:
        """Inputs of the model ``(items, ...)``, padded on a side."""
        opened = [[opened_picture(picture)] for picture in pictures]
        batch = self._processor(
            text=list(texts), images=opened, padding=True, padding_side=side, return_tensors="pt"
        )
        like = next(model.parameters())
        return {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in batch.items()
        }

    def _asked(self, question: str) -> str:
        return f"{question} {self._instruction}".strip()


def agreement(answer: str, wanted: Sequence[str]) -> float:
    """Score of an answer, 0 to 1."""
    count = sum(plain(one) == plain(answer) for one in wanted)
    return min(count / (PEOPLE if len(wanted) >= PEOPLE else 1), 1.0)


def commonest(answers: Sequence[str]) -> str:
    """The answer that most people gave, the first of those where several did."""
    counts = Counter(plain(answer) for answer in answers)
    return max(answers, key=lambda answer: counts[plain(answer)])


def plain(answer: str) -> str:
    """An answer without case, articles and punctuation."""
    text = _PUNCTUATION.sub(" ", answer.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())
