"""Strengths of models from choices between pairs: the Bradley-Terry model with ties.

Of two outputs, a judge prefers one or neither. In Davidson (1970, "On Extending the Bradley-Terry
Model to Accommodate Ties in Paired Comparison Experiments", JASA 65), a model of strength
``exp(θ_i)`` meets one of ``exp(θ_j)`` with::

    P(i preferred) ∝ exp(θ_i)
    P(j preferred) ∝ exp(θ_j)
    P(neither)     ∝ exp(δ + (θ_i + θ_j) / 2)

so ``θ_i − θ_j`` is the log-odds that ``i`` is preferred where one of them is, and ``δ`` says how
often neither is. All three exponents are linear in ``θ`` and ``δ``: it is a multinomial logit,
whose log-likelihood is concave. The base has ``θ = 0``, and normal priors around 0 on all other
parameters make the maximum exist, and be the only one, whatever the choices are, also where one
model is always preferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

#: Standard deviation of the prior of a strength: odds of 50 to 1 are two of them away from even.
PRIOR_SD = 2.0
#: That of the prior of ``δ``.
TIE_SD = 2.0
#: Newton steps at most; a handful is enough from the prior's mean.
STEPS = 100
#: A step that is smaller ends the search.
SMALLEST_STEP = 1e-11
#: How the outcomes (first, second, neither) depend on ``θ_i``, ``θ_j`` and ``δ``.
FEATURES = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 1.0]])


@dataclass(frozen=True)
class Comparison:
    """One choice between two models; ``preferred`` is one of them, or None for neither."""

    one: str
    other: str
    preferred: str | None


@dataclass(frozen=True)
class Strength:
    """A model's log-odds of being preferred to the base.

    Attributes:
        value: The mode of its posterior.
        error: Its standard deviation there, by the curvature (Laplace's approximation).
    """

    value: float
    error: float


@dataclass(frozen=True)
class Strengths:
    """The fit of all choices.

    Attributes:
        of: Model -> its strength; the base has 0, without error.
        tie: ``δ``.
    """

    of: dict[str, Strength]
    tie: float


@dataclass(frozen=True)
class _Counts:
    """How often each pair of models had each outcome.

    Attributes:
        where: Coordinates of ``θ_i``, ``θ_j`` and ``δ`` of each pair ``(pairs, 3)``.
        numbers: How often the first, the second and neither was preferred ``(pairs, 3)``.
    """

    where: Indices
    numbers: Array


def fit_strengths(
    comparisons: Iterable[Comparison],
    base: str,
    *,
    prior_sd: float = PRIOR_SD,
    tie_sd: float = TIE_SD,
) -> Strengths:
    """Fit the model; the order of the choices, and of the two models in them, has no effect.

    Args:
        comparisons: The choices.
        base: The model whose strength is 0.
        prior_sd: Standard deviation of the prior of each other strength.
        tie_sd: That of ``δ``.
    """
    given = list(comparisons)
    names = [base, *sorted({name for c in given for name in (c.one, c.other)} - {base})]
    counts = _counted(given, {name: index for index, name in enumerate(names)})
    precision = np.full(len(names) + 1, prior_sd**-2.0)
    precision[-1] = tie_sd**-2.0
    mode, covariance = _maximise(counts, precision)
    errors = np.sqrt(np.diag(covariance))
    return Strengths(
        {name: Strength(float(mode[n]), float(errors[n])) for n, name in enumerate(names)},
        float(mode[-1]),
    )


def _counted(comparisons: list[Comparison], index_of: dict[str, int]) -> _Counts:
    """Count outcomes by pair of models, the pairs sorted, so that sums have one order."""
    counter: Counter[tuple[int, int, int]] = Counter()
    for each in comparisons:
        first, second = sorted((index_of[each.one], index_of[each.other]))
        outcome = 2 if each.preferred is None else int(index_of[each.preferred] == second)
        counter[first, second, outcome] += 1
    pairs = sorted({(first, second) for first, second, _ in counter})
    numbers = [[counter[(*pair, outcome)] for outcome in range(3)] for pair in pairs]
    where = [[*pair, len(index_of)] for pair in pairs]
    return _Counts(
        np.array(where, dtype=np.intp).reshape(-1, 3), np.array(numbers, dtype=float).reshape(-1, 3)
    )


def _maximise(counts: _Counts, precision: Array) -> tuple[Array, Array]:
    """Mode ``(models + 1,)`` and covariance there, by Newton's method with halved steps."""
    mode = np.zeros(len(precision))
    value = _log_posterior(counts, precision, mode)
    for _ in range(STEPS):
        gradient, curvature = _derivatives(counts, precision, mode)
        step = np.zeros_like(mode)
        step[1:] = np.linalg.solve(curvature[1:, 1:], gradient[1:])
        factor = 1.0
        while (new := _log_posterior(counts, precision, mode + factor * step)) < value:
            factor /= 2
            if factor < SMALLEST_STEP:
                break
        if factor < SMALLEST_STEP or np.abs(step).max() < SMALLEST_STEP:
            break
        mode = mode + factor * step
        value = new
    covariance = np.zeros((len(mode), len(mode)))
    covariance[1:, 1:] = np.linalg.inv(_derivatives(counts, precision, mode)[1][1:, 1:])
    return mode, covariance


def _exponents(counts: _Counts, parameters: Array) -> Array:
    """Logarithms of the unnormalised chances of the three outcomes ``(pairs, 3)``."""
    return np.asarray(parameters[counts.where] @ FEATURES.T)


def _log_posterior(counts: _Counts, precision: Array, parameters: Array) -> float:
    exponents = _exponents(counts, parameters)
    chances = exponents - np.logaddexp.reduce(exponents, axis=1, keepdims=True)
    return float(np.sum(counts.numbers * chances) - 0.5 * np.sum(precision * parameters**2))


def _derivatives(counts: _Counts, precision: Array, parameters: Array) -> tuple[Array, Array]:
    """Gradient ``(models + 1,)`` and negative second derivative of the log posterior."""
    exponents = _exponents(counts, parameters)
    chances = np.exp(exponents - np.logaddexp.reduce(exponents, axis=1, keepdims=True))
    totals = counts.numbers.sum(axis=1, keepdims=True)
    gradient = -precision * parameters
    np.add.at(gradient, counts.where, (counts.numbers - totals * chances) @ FEATURES)
    # Covariance of the features under the model, pair by pair.
    means = chances @ FEATURES
    second = np.einsum("po,oa,ob->pab", chances, FEATURES, FEATURES)
    spread = totals[:, :, None] * (second - means[:, :, None] * means[:, None, :])
    curvature = np.diag(precision)
    np.add.at(curvature, (counts.where[:, :, None], counts.where[:, None, :]), spread)
    return gradient, curvature
