"""Scores of class answers: accuracy, cross-entropy, and the counts behind the macro F1 score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]


def answer_scores(
    logits: torch.Tensor, labels: torch.Tensor, where: str, *, f1: bool = False
) -> dict[str, torch.Tensor]:
    """Accuracy and cross-entropy of each item ``(items,)``, and the parts of the macro F1 score.

    Args:
        logits: ``(items, classes)``; a row that is not finite scores NaN.
        labels: Class numbers ``(items,)``.
        where: Key of the study file, for messages.
        f1: Whether the F1 score is wanted; an item's own is its accuracy.

    Raises:
        InputError: If the model has no class of such a number.
    """
    import torch
    from torch.nn.functional import cross_entropy

    check_numbers(labels, logits.shape[1], where)
    labels = to_device(labels, logits.device)
    # A row of NaN has an argmax too; it must not count as an answer.
    finite = torch.isfinite(logits).all(dim=1)
    answers = logits.argmax(dim=1)
    right = torch.where(finite, (answers == labels).to(logits.dtype), torch.nan)
    scores = {"accuracy": right, "cross_entropy": cross_entropy(logits, labels, reduction="none")}
    if f1:
        own = labels[:, None]
        every = torch.ones_like(own, dtype=torch.bool)
        scores["f1"] = right
        scores |= f1_counts("f1", answers[:, None], own, every, logits.shape[1])
    return scores


def check_numbers(labels: torch.Tensor, classes: int, where: str) -> None:
    """Refuse class numbers that a model has no class for.

    Raises:
        InputError: In one line.
    """
    odd = labels[(labels < 0) | (labels >= classes)]
    if odd.numel():
        raise InputError(
            f"{where}: expected class numbers 0 to {classes - 1}, as the model has {classes} "
            f"classes, received {int(odd[0])}; choose the checkpoint that was trained for these "
            "labels"
        )


def f1_counts(
    metric: str, answers: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, classes: int
) -> dict[str, torch.Tensor]:
    """Parts of the macro F1 score of each item ``(items,)``, by name.

    Of each class, the number of right answers and the number of answers and labels together.

    Args:
        metric: Name of the metric, with which the names of its parts begin.
        answers, labels: Class numbers ``(items, answers)``.
        counted: Which of them count ``(items, answers)``.
        classes: Number of classes.
    """
    parts = {}
    for number in range(classes):
        answered = (answers == number) & counted
        true = (labels == number) & counted
        parts[f"{metric}/{number} right"] = (answered & true).sum(dim=1)
        parts[f"{metric}/{number} total"] = answered.sum(dim=1) + true.sum(dim=1)
    return parts


def macro_f1(parts: Sequence[Array]) -> float:
    """Mean over the classes that occur in answers or labels of 2 right / (answers + labels).

    Args:
        parts: As of :func:`f1_counts`, each ``(items,)``.
    """
    right, total = (np.array([part.sum() for part in parts[start::2]]) for start in (0, 1))
    occurs = total > 0
    return float((2 * right[occurs] / total[occurs]).mean()) if occurs.any() else float("nan")
