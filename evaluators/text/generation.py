"""Texts that a model writes after prompts, judged by a function.

The function is ``scorer(prediction, target, prompt) -> float``. Generation is greedy, so that a
recipe writes the same each time. Prompts are padded on their left and taken in the order of their
length, so that a batch wastes little; scores are in the order of the items. A prediction without a
token is scored like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mergesearch.evaluators.batching import token_batches, token_limit
from mergesearch.evaluators.by_item import Array
from mergesearch.evaluators.text.text_items import (
    TextItems,
    first_token,
    read_prompts,
    required_tokenizer,
)
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.evaluators.text.tokenizers import parent_warnings
from mergesearch.evaluators.text.transformers_writer import TransformersWriter
from mergesearch.evaluators.text.vllm_settings import VllmSettings, check_version
from mergesearch.evaluators.text.writer import Writer, Written
from mergesearch.merging import InputError, MergesearchError
from mergesearch.merging.extensions.references import find_function

if TYPE_CHECKING:
    import torch

Scorer = Callable[[str, str | None, str], float]


def exact_match(prediction: str, target: str | None, prompt: str) -> float:
    """Return 1 if prediction and target are the same but for space around them."""
    return float(target is not None and prediction.strip() == target.strip())


def contains(prediction: str, target: str | None, prompt: str) -> float:
    """Return 1 if the target is somewhere in the prediction."""
    return float(target is not None and target.strip() in prediction)


def prefix(prediction: str, target: str | None, prompt: str) -> float:
    """Return 1 if the prediction begins with the target, but for space around them."""
    return float(target is not None and prediction.strip().startswith(target.strip()))


#: Name -> scorer.
SCORERS: Mapping[str, Scorer] = {"exact_match": exact_match, "contains": contains, "prefix": prefix}


def find_scorer(name: str, where: str) -> Scorer:
    """Find a scorer by its name, or as ``module:function``.

    Raises:
        InputError: If there is none.
    """
    if ":" not in name:
        if name not in SCORERS:
            raise InputError(
                f"{where}: expected module:function or one of {sorted(SCORERS)}, received {name!r}"
            )
        return SCORERS[name]
    scorer: Scorer = find_function(name, where)
    return scorer


class Generation(Tokenized):
    """Scores texts that a causal language model writes.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        scorer: A key of :data:`SCORERS`, or ``module:function``.
        max_new_tokens: Tokens of a prediction at most.
        until: Strings that end a prediction; they are not part of it.
        chat_template: Whether a prompt is a user's turn of a conversation.
        system_prompt: System turn before it.
        engine: The engine that generates.
        vllm: How an engine of vLLM is opened.
        batch_tokens: Padded tokens of prompts and predictions that are in memory at once, at most;
            None takes the device's limit.
        **by_item: Arguments of :class:`ByItem`; the metrics are ``score`` or ``loss``, which are
            the scorer's numbers, and ``tokens``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset()
    model_class: str | None = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: str | None,
        scorer: str,
        *,
        max_new_tokens: int = 64,
        until: Sequence[str] = (),
        chat_template: bool = False,
        system_prompt: str | None = None,
        engine: Literal["transformers", "vllm"] = "transformers",
        vllm: VllmSettings | None = None,
        batch_tokens: int | None = None,
        **by_item: Any,
    ) -> None:
        super().__init__(tokenizer, **by_item)
        self._scorer = scorer
        self._engine = engine
        # Nobody knows what a user's function does, and vLLM batches as requests come.
        self.deterministic = engine == "transformers" and scorer in SCORERS
        self._batch_tokens = batch_tokens
        self._vllm = vllm or VllmSettings()
        self._max_new_tokens = max_new_tokens
        self._until = tuple(until)
        self._chat_template = chat_template
        self._system_prompt = system_prompt
        self._writer: Writer | None = None

    def check(self) -> None:
        """Check as every evaluator of items, and find scorer, tokenizer, template and engine.

        Raises:
            InputError: In one line.
        """
        super().check()
        find_scorer(self._scorer, f"{self._where}.scorer")
        if self._engine == "vllm":
            check_version(f"{self._where}.engine")
        template = self._check_tokenizer(template=self._chat_template)
        if self._chat_template and not template:
            raise InputError(
                f"{self._where}.chat_template: expected a tokenizer with a chat template, found "
                f"none in {self._tokenizer}; use chat_template: false"
            )

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about tokenizers and chat templates that differ among base and experts."""
        return parent_warnings(sources, templates=self._chat_template)

    def _read(self, columns: Mapping[str, Any]) -> TextItems:
        import torch

        tokenizer = self._loaded()
        texts = [self._templated(tokenizer, prompt) for prompt in columns["prompt"]]
        rows = tokenizer(texts, add_special_tokens=not self._chat_template, verbose=False)[
            "input_ids"
        ]
        # A model needs a token to go on from, also where the prompt is empty.
        tokens = [
            torch.tensor(
                row or [first_token(tokenizer, f"{self._where}.tokenizer")], dtype=torch.int64
            )
            for row in rows
        ]
        return read_prompts(columns, tokens)

    def _templated(self, tokenizer: Any, prompt: str) -> str:
        """The prompt in the chat template, if there is one."""
        if not self._chat_template:
            return prompt
        turns = (
            []
            if self._system_prompt is None
            else [{"role": "system", "content": self._system_prompt}]
        )
        turns.append({"role": "user", "content": prompt})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def written(self, model: Any, items: TextItems) -> list[Written]:
        """What a model writes after each prompt; prompts are taken by their length."""
        lengths = np.array([len(row) for row in items.tokens])
        order = np.argsort(lengths, kind="stable")
        by_row: dict[int, Written] = {}
        for chosen in self._batches(model, lengths[order].tolist()):
            indices = order[chosen]
            texts = self._engine_of(model).write(model, items.rows(indices))
            by_row.update(zip(indices.tolist(), texts, strict=True))
        return [by_row[row] for row in range(len(order))]

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        scorer = find_scorer(self._scorer, f"{self._where}.scorer")
        written = self.written(model, items)
        scores = np.array([self._score(scorer, one, items, row) for row, one in enumerate(written)])
        counts = np.array([one.tokens for one in written], dtype=np.float64)
        by_metric = {"score": scores, "loss": scores, "tokens": counts}
        return {
            metric: by_metric[metric] for metric in sorted({one.metric for one in self._metrics})
        }

    def _scores(self, model: Any, items: TextItems) -> dict[str, torch.Tensor]:
        """Metric -> score of each item ``(items,)``; written texts have no gradient."""
        import torch

        return {
            metric: torch.from_numpy(scores)
            for metric, scores in self._item_scores(model, items).items()
        }

    def _batches(self, model: Any, lengths: list[int]) -> list[slice]:
        """Prompts, sorted by length, that are handed over at once; vLLM makes batches itself."""
        if self._engine == "vllm":
            return [slice(None)]
        device = next(model.parameters()).device.type
        limit = token_limit(self._batch_tokens, device, self._halvings)
        whole = [length + self._max_new_tokens for length in lengths]
        return token_batches(whole, self._batch_size, limit)

    def _engine_of(self, model: Any) -> Writer:
        """The writer, made when it is first used."""
        if self._writer is None:
            tokenizer = self._loaded()
            if self._engine == "vllm":
                from mergesearch.evaluators.text.vllm_backend import VllmWriter

                self._writer = VllmWriter(
                    tokenizer,
                    required_tokenizer(self._tokenizer, self._where),
                    model,
                    self._max_new_tokens,
                    self._until,
                    self._vllm,
                    self._where,
                )
            else:
                self._writer = TransformersWriter(
                    tokenizer, self._max_new_tokens, self._until, self._where
                )
        return self._writer

    def _score(self, scorer: Scorer, written: Written, items: TextItems, index: int) -> float:
        """Call the scorer on one item.

        Raises:
            MergesearchError: If it raises, or returns no finite number.
        """
        what = f"{self._where}.scorer: {self._scorer}: item {items.ids[index]!r}"
        try:
            value: Any = scorer(written.text, items.targets[index], items.prompts[index])
        except Exception as error:  # whatever a user's function raises
            text = " ".join(str(error).split())[:200]
            raise MergesearchError(
                f"{what}: expected a number, received {type(error).__name__}: {text}; mend the "
                "scorer"
            ) from error
        if not isinstance(value, Real | np.bool_):
            raise MergesearchError(
                f"{what}: expected a number, received {type(value).__name__}; mend the scorer"
            )
        if not math.isfinite(value):
            raise MergesearchError(
                f"{what}: expected a finite number, received {value}; mend the scorer"
            )
        return float(value)
