"""Tasks of the language-model evaluation harness on the resident model, without its overhead.

Two tiers agree document by document:

* **one** (:mod:`mergesearch.evaluators.harness.frozen`): requests are built once in a worker and
  their tokens frozen; every trial scores them. Generation runs through the harness's own model
  class on the frozen requests.
* **two** (:mod:`mergesearch.evaluators.harness.harness_loop`): ``lm_eval.evaluate`` on the loaded
  task objects, for tasks whose requests depend on answers.

Every document is an item, its task is its domain, and directions are those that tasks declare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Candidate, ItemSubset, Measurement, Objective, Split
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.harness.document_scorer import DocumentScorer
from mergesearch.evaluators.harness.prompt import Prompt
from mergesearch.evaluators.harness.task_scores import domain_score
from mergesearch.evaluators.harness.task_set import TaskSet
from mergesearch.evaluators.harness.tasks import TaskOptions, check_disjoint
from mergesearch.evaluators.items import balanced_order, chosen_indices
from mergesearch.evaluators.objectives import (
    Metric,
    constraints_of,
    needed_references,
    objectives_of,
    tolerances_of,
)
from mergesearch.evaluators.pooling import with_resamples
from mergesearch.evaluators.reduction import DomainScore, measure
from mergesearch.evaluators.text.tokenizers import load_tokenizer, parent_warnings
from mergesearch.merging import InputError

#: Kinds of requests whose answers are likelihoods.
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


class LmEval(EvaluatorBase):
    """Scores a causal language model on tasks of lm_eval.

    Args:
        tasks: The tasks.
        metrics: Objectives and bounds; ``metric`` "" means every task's default.
        tokenizer: Folder of the tokenizer that all models share.
        include_path: Folder of more task files.
        batch_size: Rows of a forward pass at most.
        batch_tokens: Padded tokens of a forward pass at most; None takes the device's limit.
        max_length: Tokens that the model reads; None takes its configuration's.
        packed: Whether the choices of a document share a row; None tries whether the model allows
            it.
        padding: Side on which rows are padded.
        prompt: How prompts are made.
        max_items: Search on so many of the search documents only.
        experts: Task -> its expert, where that has another name.
        allow_public: Allow public benchmarks as targets of the search.
        where: Key of the study file, for messages.
    """

    selects = True
    model_class: str | None = "AutoModelForCausalLM"
    provides = frozenset({"items"})
    _subject = "lm_eval's metrics"

    def __init__(
        self,
        tasks: Sequence[TaskOptions],
        metrics: Sequence[Metric],
        *,
        tokenizer: str | None,
        include_path: Path | None = None,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        packed: bool | None = None,
        padding: Literal["right", "left"] = "right",
        prompt: Prompt | None = None,
        max_items: int | None = None,
        experts: Mapping[str, str] | None = None,
        allow_public: bool = False,
        where: str,
    ) -> None:
        self._where = where
        self._tokenizer = tokenizer
        self._prompt = prompt or Prompt()
        self._max_items = max_items
        self._experts = dict(experts or {})
        self._tasks = TaskSet(
            tasks,
            metrics,
            include_path=None if include_path is None else str(include_path),
            allow_public=allow_public,
            where=where,
        )
        self._scorer = DocumentScorer(
            tokenizer=tokenizer,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_length=max_length,
            packed=packed,
            padding=padding,
            prompt=self._prompt,
            where=where,
        )

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """Names and directions, as the tasks declare them."""
        return objectives_of(self._tasks.metrics)

    @cached_property
    def constraints(self) -> tuple[str, ...]:
        """Names of the bounds."""
        return constraints_of(self._tasks.metrics)

    @property
    def deterministic(self) -> bool:
        """Whether all tasks compare likelihoods; others may draw the answers that they write."""
        return all(task.task.OUTPUT_TYPE in LIKELIHOODS for task in self._tasks.by_split["search"])

    @property
    def tolerances(self) -> Mapping[str, str]:
        """Tolerances of the bounds that have one."""
        return tolerances_of(self._tasks.metrics)

    @cached_property
    def additive(self) -> tuple[str, ...]:
        """Means of metrics that are means over documents."""
        return self._tasks.additive

    def check(self) -> None:
        """Load tasks and documents, and refuse those that do not fit together.

        Raises:
            InputError: In one line.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._where}.tokenizer: required key is missing: a study without a base has none"
            )
        check_disjoint(self._tasks.by_split, self._where)
        assert self._tasks.metrics
        load_tokenizer(self._tokenizer, f"{self._where}.tokenizer")

    def references(self) -> frozenset[str]:
        """Anchors that objectives are relative to."""
        return needed_references(self._tasks.metrics, self._tasks.names, self._experts)

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about tokenizers and chat templates that differ among base and experts."""
        return parent_warnings(sources, templates=bool(self._prompt.apply_chat_template))

    def open(self) -> None:
        """Load tasks; requests are built with the first model."""
        self.check()

    def size(self, split: Split) -> int:
        """Number of documents of all tasks that are used."""
        return len(self._used_documents(split))

    def halve_batch(self) -> int | None:
        """Halve the rows of a forward pass."""
        return self._scorer.halve_batch()

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score every task on documents of a split.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
            InputError: If a metric has no score for single documents.
        """
        used = self._used_documents(split)
        domains = self._tasks.document_domains(split)[used]
        indices = chosen_indices(domains, items)
        documents = used[indices].tolist()
        by_document: dict[int, dict[str, Any]]
        by_document = candidate.scored.setdefault((id(self), split), {})
        fresh = [document for document in documents if document not in by_document]
        if fresh:
            by_document.update(self._answered(candidate.model, split, fresh))
        scores = self._by_domain([by_document[one] for one in documents], indices, domains[indices])
        made_of = (self._tasks.metrics, scores, candidate.references, self._experts)
        measured = measure(*made_of, domains)
        return measured if split == "search" else with_resamples(measured, *made_of)

    def _answered(
        self, model: Any, split: Split, documents: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Index of each document -> metric -> its score."""
        return self._scorer.score(model, split, self._tasks.by_split[split], documents)

    def _by_domain(
        self,
        documents: Sequence[Mapping[str, Any]],
        indices: npt.NDArray[np.intp],
        domains: npt.NDArray[np.str_],
    ) -> dict[str, dict[str, DomainScore]]:
        """Metric -> task -> score, from the scores, indices and tasks of some documents."""
        rows_of = {str(name): np.flatnonzero(domains == name) for name in np.unique(domains)}
        scores: dict[str, dict[str, DomainScore]] = {}
        for metric in self._tasks.metrics:
            for task, name in self._tasks.measured_by(metric):
                rows = rows_of.get(task.name)
                if rows is not None:
                    own = [documents[row] for row in rows.tolist()]
                    score = domain_score(task, name, own, indices[rows], self._where)
                    scores.setdefault(metric.metric, {})[task.name] = score
        return scores

    def _used_documents(self, split: Split) -> npt.NDArray[np.intp]:
        """Indices of the documents that are used, among all of the split ``(items,)``."""
        order = balanced_order(self._tasks.document_domains(split))
        return np.sort(order[: self._max_items] if split == "search" else order)
