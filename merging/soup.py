"""Greedy soup: which experts to average, chosen by their score on held-out data.

Wortsman 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", recipe 1: experts join in the order of their own scores, each only if the average with it scores no
worse than without. Averaging itself is the operator ``average`` with the coefficients of :func:`soup_coefficients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from merging.errors import InputError

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Tasting:
    """One candidate of a soup.

    Attributes:
        expert: Name of the expert that was tried.
        score: Score of the average with it; for the first expert its own.
        kept: Whether it stayed in.
    """

    expert: str
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """The outcome of :func:`greedy_soup`.

    Attributes:
        chosen: Experts to average, in the order in which they joined.
        score: Score of their average.
        history: Every expert that was tried, in order.
    """

    chosen: tuple[str, ...]
    score: float
    history: tuple[Tasting, ...]


def greedy_soup(
    scores: Mapping[str, float],
    evaluate: Callable[[tuple[str, ...]], float],
    direction: Direction = "maximize",
) -> Soup:
    """Choose experts to average.

    Args:
        scores: Expert -> its own score on held-out data. Of equal scores the first goes first.
        evaluate: Score of the uniform average of the named experts on the same data; called once per expert but the
            best. NaN counts as worse than anything.
        direction: Which scores are better.

    Raises:
        InputError: If there are no scores, or one is NaN.
    """
    if not scores or any(math.isnan(score) for score in scores.values()):
        received = dict(scores) if scores else "none"
        raise InputError(f"greedy soup: expected a score other than NaN for each expert, received {received}")
    sign = 1.0 if direction == "maximize" else -1.0
    first, *rest = sorted(scores, key=lambda name: -sign * scores[name])
    chosen: tuple[str, ...] = (first,)
    best = scores[first]
    history = [Tasting(first, best, True)]
    for name in rest:
        score = evaluate((*chosen, name))
        kept = sign * score >= sign * best
        history.append(Tasting(name, score, kept))
        if kept:
            chosen, best = (*chosen, name), score
    return Soup(chosen, best, tuple(history))


def soup_coefficients(chosen: Sequence[str], experts: Sequence[str]) -> list[float]:
    """Coefficients of the operator ``average`` for the uniform average of the chosen ones among ``experts``.

    Raises:
        InputError: If none is chosen, one is chosen twice, or one is not among the experts.
    """
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(experts):
        raise InputError(f"soup: expected distinct names among {list(experts)}, received {list(chosen)}")
    return [1.0 / len(chosen) if name in chosen else 0.0 for name in experts]
