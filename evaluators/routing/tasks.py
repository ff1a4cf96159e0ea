"""Input-dependent merges on tasks of lm_eval: the prompt of a document decides how it is merged.

The prompt is what comes before the answer of the document's first request, examples included. All
its requests are answered by that one merge.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.base import Candidate, ItemSubset, Measurement, Split
from mergesearch.evaluators.harness.document_scorer import needs_loop
from mergesearch.evaluators.harness.evaluator import LmEval
from mergesearch.evaluators.items import balanced_order
from mergesearch.evaluators.routing.routed import ForInputs
from mergesearch.evaluators.routing.t3 import T3Rule
from mergesearch.evaluators.routing.texts import padded_prompts
from mergesearch.evaluators.routing.twin_merging import TwinRule
from mergesearch.merging import InputError
from mergesearch.merging.models.task_heads import OwnHead, TaskHead

if TYPE_CHECKING:
    import torch


class OfTasks(ForInputs, LmEval, ABC):
    """Documents of tasks, each of which begins with a prompt."""

    def check(self) -> None:
        """As of all tasks, and refuse those whose documents have no prompt.

        Raises:
            InputError: In one line.
        """
        super().check()
        for task in (one for tasks in self._tasks.by_split.values() for one in tasks):
            whole = task.task.OUTPUT_TYPE == "loglikelihood_rolling"
            if whole or needs_loop(task):
                why = "whose texts are scored whole" if whole else "which lm_eval's own loop scores"
                raise InputError(
                    f"{self._where}.tasks: expected tasks with prompts for "
                    f"{self.fixed['method']}, which merges for each, received {task.name!r}, "
                    f"{why}; leave it out, or leave out routing"
                )

    def head_for(self, candidate: Candidate) -> TaskHead:
        """The model's own head."""
        return OwnHead()

    def search_domains(self) -> Collection[str]:
        """Names of the tasks."""
        return self._tasks.names

    def seen_by_router(
        self, model: Any, batch_size: int
    ) -> tuple[list[str], Iterator[Mapping[str, torch.Tensor]]]:
        """Task of each search document, and their prompts, in batches."""
        documents = self._used_documents("search").tolist()
        domains = self._tasks.document_domains("search")[documents].tolist()
        parts = (
            documents[start : start + batch_size] for start in range(0, len(documents), batch_size)
        )
        return domains, (self._prompts(model, "search", part) for part in parts)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score the merge of a recipe with routing, a loaded bundle, or a checkpoint."""
        return super().evaluate(self.in_place(candidate), split, items)

    def _answered(
        self, model: Any, split: Split, documents: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Scores by the merge of each prompt; batches that are decided about mix all tasks."""
        if not hasattr(model, "item_weights"):
            return super()._answered(model, split, documents)
        order = balanced_order(self._tasks.document_domains(split)[[*documents]])
        mixed = [documents[place] for place in order.tolist()]
        size = self._scorer.batch_size
        scores: dict[int, dict[str, Any]] = {}
        for start in range(0, len(mixed), size):
            part = mixed[start : start + size]
            weights = model.weights_for(self._prompts(model.model, split, part))
            for chosen in model.merges(weights):
                own = sorted(part[place] for place in chosen.tolist())
                scores |= super()._answered(model.model, split, own)
        return scores

    def _prompts(
        self, model: Any, split: Split, documents: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Prompts of some documents, as arguments of the model."""
        import torch

        tasks = self._tasks.by_split[split]
        rows = self._scorer.prompts(model, split, tasks, documents)
        return padded_prompts([torch.tensor(row) for row in rows], model)


class T3Tasks(T3Rule, OfTasks):
    """Scores T3 on tasks."""


class TwinMergingTasks(TwinRule, OfTasks):
    """Scores Twin-Merging on tasks; each task belongs to an expert."""


#: Method -> what scores tasks by it.
TASKS: Mapping[str, type[OfTasks]] = {"t3": T3Tasks, "twin_merging": TwinMergingTasks}
