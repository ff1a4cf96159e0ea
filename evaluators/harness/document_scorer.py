"""What a worker keeps to score documents: the bound model, and the requests of every split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators.base import Split
from mergesearch.evaluators.batching import KeptPlans, token_limit
from mergesearch.evaluators.harness.frozen import (
    FrozenTask,
    freeze_task,
    prompt_of,
    score_frozen,
)
from mergesearch.evaluators.harness.harness_loop import score_by_harness
from mergesearch.evaluators.harness.plan import ScoringPlan
from mergesearch.evaluators.harness.prompt import Prompt
from mergesearch.evaluators.harness.rows import Options, Tokens
from mergesearch.evaluators.harness.scoring import can_pack
from mergesearch.evaluators.harness.tasks import SplitTask
from mergesearch.evaluators.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from mergesearch.evaluators.harness.harness_model import HarnessModel

#: Output types whose requests are known before any answer.
FIRST_TIER = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
#: Requests of each task that packing is tried on.
TRIED = 24


@dataclass(frozen=True, eq=False)
class FrozenSplit:
    """The requests of a split.

    Attributes:
        tasks: Requests of each task; None where the harness's own loop scores it.
        packed: Whether the choices of a document share a row.
    """

    tasks: list[FrozenTask | None]
    packed: bool


class DocumentScorer:
    """Scores documents of tasks on the resident model, each task by its tier.

    Args:
        tokenizer: Folder of the tokenizer that all models share.
        batch_size: Rows of a forward pass at most.
        batch_tokens: Padded tokens of a forward pass at most; None takes the device's limit.
        max_length: Tokens that the model reads; None takes its configuration's.
        packed: Whether the choices of a document share a row; None tries whether the model allows
            it.
        padding: Side on which rows are padded.
        prompt: How prompts are made.
        where: Key of the study file, for messages.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None,
        batch_size: int,
        batch_tokens: int | None,
        max_length: int | None,
        packed: bool | None,
        padding: Literal["right", "left"],
        prompt: Prompt,
        where: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._halvings = 0
        self._max_length = max_length
        self._packed = packed
        self._padding = padding
        self._prompt = prompt
        self._where = where
        self._bound: HarnessModel | None = None
        self._plans = KeptPlans[ScoringPlan]()
        self.frozen: dict[Split, FrozenSplit] = {}

    def score(
        self, model: Any, split: Split, tasks: Sequence[SplitTask], documents: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Score some documents of a split.

        Args:
            model: The resident model.
            split: The split.
            tasks: All tasks on it.
            documents: Indices of the documents among those of all tasks of the split.

        Returns:
            Index of each document -> metric -> its score.
        """
        harness = self._harness(model)
        frozen = self._frozen(harness, split, tasks)
        options = self._options(harness, packed=frozen.packed)
        scores: dict[int, dict[str, Any]] = {}
        for place, first, own in _by_task(tasks, documents):
            requests = frozen.tasks[place]
            answered = (
                score_by_harness(harness, tasks[place], own, self._prompt)
                if requests is None
                else score_frozen(harness, requests, own, options, self._plans)
            )
            scores |= {first + d: answer for d, answer in zip(own, answered, strict=True)}
        return scores

    def prompts(
        self, model: Any, split: Split, tasks: Sequence[SplitTask], documents: Sequence[int]
    ) -> list[Tokens]:
        """Tokens of the prompt of each document: those before the answer of its first request.

        Args:
            model: The resident model.
            split: The split.
            tasks: All tasks on it, none of which needs the harness's own loop.
            documents: As for :meth:`score`.
        """
        harness = self._harness(model)
        frozen = self._frozen(harness, split, tasks)
        found: dict[int, Tokens] = {}
        for place, first, own in _by_task(tasks, documents):
            requests = frozen.tasks[place]
            assert requests is not None
            found |= {first + d: prompt_of(harness, requests, d) for d in own}
        return [found[document] for document in documents]

    @property
    def batch_size(self) -> int:
        """Rows of a forward pass at most."""
        return self._batch_size

    def halve_batch(self) -> int | None:
        """Halve the rows of a forward pass; None where they are one."""
        if self._batch_size < 2:
            return None
        self._batch_size //= 2
        self._halvings += 1
        self._plans.clear()
        self._bound = None  # it keeps the old size
        return self._batch_size

    def _harness(self, model: Any) -> HarnessModel:
        """The harness's view of the resident model."""
        from mergesearch.evaluators.harness.harness_model import bind

        if self._bound is None or self._bound.model is not model:
            assert self._tokenizer is not None
            tokenizer = load_tokenizer(self._tokenizer, f"{self._where}.tokenizer")
            self._bound = bind(model, tokenizer, self._batch_size, self._max_length)
        return self._bound

    def _frozen(
        self, harness: HarnessModel, split: Split, tasks: Sequence[SplitTask]
    ) -> FrozenSplit:
        """Requests of a split, built when the split is first used."""
        if split not in self.frozen:
            frozen = [
                None if needs_loop(task) else freeze_task(harness, task, self._prompt)
                for task in tasks
            ]
            self.frozen[split] = FrozenSplit(frozen, self._packs(harness, frozen))
        return self.frozen[split]

    def _packs(self, harness: HarnessModel, frozen: Sequence[FrozenTask | None]) -> bool:
        """Whether choices share rows: as the study says, or as the model turns out to allow."""
        if self._packed is not None:
            return self._packed
        tried = [
            tokens
            for task in frozen
            if task is not None
            for tokens in list(task.tokens.values())[:TRIED]
        ]
        requests = [request for tokens in tried for request in tokens]
        options = self._options(harness, packed=False)
        return bool(requests) and can_pack(harness.model, requests, options)

    def _options(self, harness: HarnessModel, *, packed: bool) -> Options:
        device = next(harness.model.parameters()).device.type
        tokens = token_limit(self._batch_tokens, device, self._halvings)
        return Options(self._batch_size, harness.max_length, packed, self._padding, tokens)


def _by_task(
    tasks: Sequence[SplitTask], documents: Sequence[int]
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield the place of each task that some documents are of, its first document, and these.

    Documents are counted from the first of the task.
    """
    first = 0
    for place, task in enumerate(tasks):
        stop = first + len(task.document_indices)
        own = [document - first for document in documents if first <= document < stop]
        if own:
            yield place, first, own
        first = stop


def needs_loop(task: SplitTask) -> bool:
    """Whether the harness's own loop scores the task."""
    tier = task.options.tier
    return tier == "two" or (tier == "auto" and task.task.OUTPUT_TYPE not in FIRST_TIER)
