"""The first tier: requests that are built once, and scored for every candidate.

A worker builds the requests of a task and freezes their tokens. A candidate's answers go through
the task's own filters to its ``process_results``, document by document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.batching import KeptPlans
from mergesearch.evaluators.harness.plan import ScoringPlan
from mergesearch.evaluators.harness.prompt import Prompt, request_arguments
from mergesearch.evaluators.harness.rows import Answer, Options, Request, Tokens
from mergesearch.evaluators.harness.scoring import score_requests
from mergesearch.evaluators.harness.tasks import SplitTask, quiet
from mergesearch.merging import MergesearchError

if TYPE_CHECKING:
    from mergesearch.evaluators.harness.harness_model import HarnessModel

#: Request types whose answers are log-likelihoods of frozen tokens.
SCORED = ("loglikelihood", "loglikelihood_rolling")


@dataclass(frozen=True, eq=False)
class FrozenTask:
    """A task's requests on a split, ready to be scored.

    Attributes:
        source: The task.
        documents: Every document ``(documents,)``.
        instances: The requests of each document, in the task's order.
        tokens: ``id`` of an instance -> the tokens it is scored on; instances that generate text
            are not among them.
    """

    source: SplitTask
    documents: tuple[Any, ...]
    instances: tuple[tuple[Any, ...], ...]
    tokens: Mapping[int, tuple[Request, ...]]


def freeze_task(harness: HarnessModel, source: SplitTask, prompt: Prompt) -> FrozenTask:
    """Build a task's requests on a split, and take down their tokens."""
    task = source.task
    arguments = request_arguments(prompt, harness)
    with quiet():
        task.build_all_requests(samples=list(source.document_indices), **arguments)
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    documents = [doc for _, doc in task.doc_iterator(samples=list(source.document_indices))]
    groups = tuple(
        tuple(sorted(by_document[i], key=lambda one: one.idx)) for i in range(len(documents))
    )
    scored = [one for group in groups for one in group if one.request_type in SCORED]
    with quiet():
        tokens = {id(one): harness.tokens_of(one) for one in scored}
    return FrozenTask(source, tuple(documents), groups, tokens)


def prompt_of(harness: HarnessModel, frozen: FrozenTask, document: int) -> Tokens:
    """Tokens of the prompt of a document, no more of its end than the model reads."""
    first = frozen.instances[document][0]
    requests = frozen.tokens.get(id(first))
    tokens = (
        tuple(harness.lm.tok_encode(first.args[0])) if requests is None else requests[0].context
    )
    return tokens[-harness.max_length :]


def score_frozen(
    harness: HarnessModel,
    frozen: FrozenTask,
    documents: Sequence[int],
    options: Options,
    plans: KeptPlans[ScoringPlan],
) -> list[dict[str, Any]]:
    """Score some documents of a task on the resident model.

    Args:
        harness: The harness's view of the resident model.
        frozen: The task's requests.
        documents: Indices of the documents among those of the task.
        options: How rows are run.
        plans: Plans of earlier candidates, to which new ones are added.

    Returns:
        Of each document, metric -> score.

    Raises:
        MergesearchError: If the task cannot process the answers.
    """
    instances = [one for document in documents for one in frozen.instances[document]]
    _answer_all(harness, frozen, instances, options, plans)
    chosen = frozen.source.filter
    for ensemble in getattr(frozen.source.task, "_filters", []):
        if ensemble.name == chosen:
            ensemble.apply(instances)
    return [
        _processed(
            frozen, document, [one.filtered_resps[chosen] for one in frozen.instances[document]]
        )
        for document in documents
    ]


def _answer_all(
    harness: HarnessModel,
    frozen: FrozenTask,
    instances: Sequence[Any],
    options: Options,
    plans: KeptPlans[ScoringPlan],
) -> None:
    """Put the model's answers into the instances, as the harness would."""
    for one in instances:
        one.resps = []
        one.filtered_resps = {}
    scored = [one for one in instances if id(one) in frozen.tokens]
    requests = [request for one in scored for request in frozen.tokens[id(one)]]
    answers = iter(score_requests(harness.model, requests, options, plans))
    for one in scored:
        parts = [next(answers) for _ in frozen.tokens[id(one)]]
        one.resps = [_answer(one.request_type, parts)] * one.repeats
    harness.generate([one for one in instances if id(one) not in frozen.tokens], options)


def _answer(kind: str, parts: Sequence[Answer]) -> Any:
    """What the harness hands to a filter: both numbers, or the sum over the windows of a text."""
    return sum(value for value, _ in parts) if kind == "loglikelihood_rolling" else parts[0]


def _processed(frozen: FrozenTask, document: int, responses: list[Any]) -> dict[str, Any]:
    """Metric -> score of one document, as the task computes it from its filtered responses."""
    try:
        scores: dict[str, Any] = frozen.source.task.process_results(
            frozen.documents[document], responses
        )
    except Exception as error:
        raise MergesearchError(
            f"{frozen.source.name}: expected scores of document {frozen.source.ids[document]}, "
            f"received {type(error).__name__}: {error}"
        ) from error
    return scores
