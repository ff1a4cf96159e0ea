"""What a model writes after a prompt, judged by a function:
``scorer(prediction, target, prompt) -> float``.

Generation is greedy, so that a recipe writes the same each time. Prompts are filled up on their
left and taken in the order of their length, so that a batch wastes little; scores come back in the
order of the items. A prediction of no token is scored like any other.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mergesearch.evaluators.by_item import Array, ByItem
from mergesearch.evaluators.text.text_items import (
    TextItems,
    first_token,
    longest,
    read_prompts,
    required_tokenizer,
)
from mergesearch.evaluators.text.tokenizers import load_tokenizer, parent_warnings
from mergesearch.evaluators.text.writer import Writer, Written, cut
from mergesearch.merging import InputError, MergesearchError

if TYPE_CHECKING:
    import torch

Scorer = Callable[[str, str | None, str], float]


def exact_match(prediction: str, target: str | None, prompt: str) -> float:
    """1 if prediction and target are the same but for space around them."""
    return float(target is not None and prediction.strip() == target.strip())


def contains(prediction: str, target: str | None, prompt: str) -> float:
    """1 if the target is somewhere in the prediction."""
    return float(target is not None and target.strip() in prediction)


def prefix(prediction: str, target: str | None, prompt: str) -> float:
    """1 if the prediction begins with the target, but for space around them."""
    return float(target is not None and prediction.strip().startswith(target.strip()))


#: Name -> scorer.
SCORERS: Mapping[str, Scorer] = {"exact_match": exact_match, "contains": contains, "prefix": prefix}


def find_scorer(name: str, where: str) -> Scorer:
    """A scorer by its name, or as ``module:function``.

    Raises:
        InputError: If there is none.
    """
    if ":" not in name:
        if name not in SCORERS:
            raise InputError(
                f"{where}: expected module:function or one of {sorted(SCORERS)}, received {name!r}"
            )
        return SCORERS[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever a module raises while it is imported
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: expected a module that can be imported, received {module!r}: "
            f"{type(error).__name__}: {text}"
        ) from None
    scorer = getattr(found, attribute, None)
    if not callable(scorer):
        what = "none" if scorer is None else type(scorer).__name__
        raise InputError(
            f"{where}: expected a function {attribute!r} in module {module!r}, received {what}"
        )
    checked: Scorer = scorer
    return checked


class Generation(ByItem):
    """Scores what a causal language model writes.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        scorer: A key of :data:`SCORERS`, or ``module:function``.
        max_new_tokens: Tokens of a prediction at most.
        until: Strings that end a prediction; they are no part of it.
        chat_template: Whether a prompt is said as a user's turn of a conversation.
        system_prompt: Said before it.
        engine: Who generates.
        **by_item: As for :class:`ByItem`; the metrics are ``score`` or ``loss``, what the scorer
            says, and ``tokens``.
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
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._until = tuple(until)
        self._chat_template = chat_template
        self._system_prompt = system_prompt
        self._writer: Writer | None = None

    def check(self) -> None:
        """As every evaluator of items, and find scorer, tokenizer, chat template and engine.

        Raises:
            InputError: In one line.
        """
        super().check()
        find_scorer(self._scorer, f"{self._where}.scorer")
        if self._engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise InputError(f"{self._where}.engine: vllm needs `pip install mergesearch[vllm]`")
        tokenizer = self._loaded()
        if self._chat_template and not tokenizer.chat_template:
            raise InputError(
                f"{self._where}.chat_template: expected a tokenizer with a chat template, found "
                "none in "
                f"{self._tokenizer}; use chat_template: false"
            )

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Tokenizers and chat templates that differ among base and experts."""
        return parent_warnings(sources, templates=self._chat_template)

    def _loaded(self) -> Any:
        return load_tokenizer(
            required_tokenizer(self._tokenizer, self._where), f"{self._where}.tokenizer"
        )

    def _read(self, columns: Mapping[str, Any]) -> TextItems:
        import torch

        tokenizer = self._loaded()
        texts = [self._said(tokenizer, prompt) for prompt in columns["prompt"]]
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

    def _said(self, tokenizer: Any, prompt: str) -> str:
        """A prompt as the model reads it."""
        if not self._chat_template:
            return prompt
        turns = (
            []
            if self._system_prompt is None
            else [{"role": "system", "content": self._system_prompt}]
        )
        turns.append({"role": "user", "content": prompt})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Scores in item order of what is written in the order of the prompts' lengths."""
        scorer = find_scorer(self._scorer, f"{self._where}.scorer")
        order = np.argsort([len(row) for row in items.tokens], kind="stable")
        scores = np.empty(len(order))
        counts = np.empty(len(order))
        for start in range(0, len(order), self._writing_size(len(order))):
            places = order[start : start + self._writing_size(len(order))]
            part = items.rows(places)
            written = self._engine_of(model).write(model, part)
            scores[places] = [
                self._score(scorer, one, part, place) for place, one in enumerate(written)
            ]
            counts[places] = [one.tokens for one in written]
        found = {"score": scores, "loss": scores, "tokens": counts}
        return {metric: found[metric] for metric in sorted({one.metric for one in self._metrics})}

    def _scores(self, model: Any, items: TextItems) -> dict[str, torch.Tensor]:
        """Metric -> score of each item ``(items,)``; what is written has no gradient."""
        import torch

        return {
            metric: torch.from_numpy(scores)
            for metric, scores in self._item_scores(model, items).items()
        }

    def _writing_size(self, count: int) -> int:
        """Prompts that are handed over at once; vLLM makes batches of its own."""
        return count if self._engine == "vllm" else self._batch_size

    def _engine_of(self, model: Any) -> Writer:
        if self._writer is None:
            tokenizer = self._loaded()
            if self._engine == "vllm":
                from mergesearch.evaluators.text.vllm_backend import VllmWriter

                base = required_tokenizer(self._tokenizer, self._where)
                self._writer = VllmWriter(base, model, tokenizer, self._max_new_tokens, self._until)
            else:
                self._writer = TransformersWriter(
                    tokenizer, self._max_new_tokens, self._until, self._where
                )
        return self._writer

    def _score(self, scorer: Scorer, written: Written, items: TextItems, place: int) -> float:
        """What the scorer says of one item.

        Raises:
            MergesearchError: If it raises, or says no finite number.
        """
        what = f"{self._where}.scorer: {self._scorer}: item {items.ids[place]!r}"
        try:
            value: Any = scorer(written.text, items.targets[place], items.prompts[place])
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


class TransformersWriter:
    """Greedy generation by the resident model itself.

    Args:
        tokenizer: Of the prompts.
        max_new_tokens: Tokens at most.
        until: Strings that end a text.
        where: Key of the study file, for messages.
    """

    def __init__(
        self, tokenizer: Any, max_new_tokens: int, until: Sequence[str], where: str
    ) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._until = until
        self._where = where

    def write(self, model: Any, items: TextItems) -> list[Written]:
        """What the model writes after each item's prompt.

        Raises:
            InputError: If prompts are too long for the model.
        """
        import torch

        ids, mask = self._batch(model, items)
        ends = self._ends(model)
        pad = self._tokenizer.pad_token_id
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Settings of sampling, which checkpoints bring and generate would warn of.
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad if pad is not None else min(ends, default=0),
                stopping_criteria=[self._stopped(ids.shape[1])] if self._until else None,
            )
        return [self._written(row, ends) for row in found[:, ids.shape[1] :].tolist()]

    def _batch(self, model: Any, items: TextItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``(items, tokens)``, filled up on the left."""
        import torch

        width = max(len(row) for row in items.tokens)
        room = longest(model)
        if room is not None and width + self._max_new_tokens > room:
            place = max(range(len(items.tokens)), key=lambda n: len(items.tokens[n]))
            raise InputError(
                f"{self._where}.max_new_tokens: expected prompts and predictions of at most {room} "
                "tokens, received a "
                f"prompt of {width} (item {items.ids[place]!r}) and {self._max_new_tokens} more; "
                "shorten one"
            )
        ids = torch.full((len(items.tokens), width), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(items.tokens):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
        device = next(model.parameters()).device
        return ids.to(device), mask.to(device)

    def _ends(self, model: Any) -> set[int]:
        """Tokens that end a sequence, as model and tokenizer have it."""
        own = model.generation_config.eos_token_id
        found = set(own) if isinstance(own, list | tuple) else {own}
        return {
            int(number) for number in found | {self._tokenizer.eos_token_id} if number is not None
        }

    def _stopped(self, start: int) -> Callable[..., torch.Tensor]:
        """Which rows end with a stop string now: its last token is the last of the row."""
        import torch

        # A token is a byte at least, but for the one that a stop string may begin within.
        reach = 1 + max(len(text.encode()) for text in self._until)

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
            tails = self._tokenizer.batch_decode(
                ids[:, max(start, ids.shape[1] - reach) :], skip_special_tokens=True
            )
            return torch.tensor(
                [any(u in tail for u in self._until) for tail in tails], device=ids.device
            )

        return stopped

    def _written(self, row: list[int], ends: set[int]) -> Written:
        """The text of one row of new tokens."""
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        while stop and row[stop - 1] == self._tokenizer.pad_token_id:
            stop -= 1
        text = self._tokenizer.decode(row[:stop], skip_special_tokens=True)
        return Written(cut(text, self._until), stop)
