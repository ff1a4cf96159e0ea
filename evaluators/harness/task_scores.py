"""Computes a task's value, its error and comparable item scores from those of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.harness.tasks import SplitTask
from mergesearch.evaluators.reduction import DomainScore
from mergesearch.merging import InputError

#: Seed of the bootstrap behind the errors of values that are no means, and its number of samples.
BOOTSTRAP = (0, 100)


def is_mean(task: SplitTask, metric: str) -> bool:
    """Whether a task's value is the mean of its documents' scores."""
    function = task.task.aggregation()[metric]
    return bool(getattr(function, "__name__", "") in ("mean", "nanmean"))


def domain_score(
    task: SplitTask,
    metric: str,
    documents: Sequence[Mapping[str, Any]],
    item_indices: npt.NDArray[np.intp],
    where: str,
) -> DomainScore:
    """Score a task, which is a domain, on some documents.

    Args:
        task: The task.
        metric: What to measure.
        documents: Of each document, metric -> score.
        item_indices: Indices of the documents in the split ``(documents,)``.
        where: Key of the study file, for messages.

    Raises:
        InputError: If a document has no such score.
    """
    given = [scores[metric] for scores in documents if metric in scores]
    if len(given) < len(documents):
        measured = sorted({key for scores in documents for key in scores})
        raise InputError(
            f"{where}: {task.name}: expected {metric!r} of every document, received it for "
            f"{len(given)} of {len(documents)}: {measured} are measured"
        )
    value, error, mean = _aggregate(task.task, metric, given)
    if mean:
        items = np.array([float(score) for score in given])
        return DomainScore(value, error, items, item_indices)
    items = np.array([_item_score(score, task, metric, where) for score in given])
    function: Callable[[Any], float] = task.task.aggregation()[metric]

    def value_of(rows: npt.NDArray[np.intp]) -> float:
        return float(function([given[row] for row in rows]))

    return DomainScore(value, error, items, item_indices, mean=False, value_of=value_of)


def _aggregate(task: Any, metric: str, values: Sequence[Any]) -> tuple[float, float, bool]:
    """A task's value from those of documents, its standard error, and whether it is their mean."""
    function: Callable[[Any], float] = task.aggregation()[metric]
    value = float(function(list(values)))
    if np.isscalar(values[0]) or isinstance(values[0], bool):
        plain = np.asarray(values, dtype=np.float64)
        if abs(plain.mean() - value) <= 1e-9 * max(1.0, abs(value)):
            return float(plain.mean()), float(plain.std() / np.sqrt(plain.size)), True
    seed, count = BOOTSTRAP
    rng = np.random.default_rng(seed)
    drawn = [
        function([values[i] for i in rng.integers(len(values), size=len(values))])
        for _ in range(count)
    ]
    return value, float(np.std(drawn)), False


def _item_score(value: Any, task: SplitTask, metric: str, where: str) -> float:
    """A document's score, better where the metric is.

    It is a number, or, for perplexities, the log-likelihood per unit.

    Raises:
        InputError: If the metric has no value for one document.
    """
    if isinstance(value, bool | int | float | np.number):
        # Log-likelihoods are better where they are high, perplexities where they are low.
        flipped = "perplexity" in metric and task.direction(metric) == "minimize"
        return -float(value) if flipped else float(value)
    if (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(part, int | float) for part in value)
    ):
        return -float(value[0]) / float(value[1])
    raise InputError(
        f"{where}: {task.name}: expected a metric with a score for every document, received "
        f"{metric!r}, which is made of {type(value).__name__}; choose another"
    )
