"""What the nominees of a study would score on all conceivable items, given every evaluation.

The best of many noisy scores is partly luck, on the search items and again on the validation items.
The final choice therefore goes by the posterior mean of each nominee's loss:

1. The *prior* comes from the search. Losses of trials around the recommendation are a smooth
   function of the point plus noise (a Gaussian process; Rasmussen and Williams 2006, "Gaussian
   Processes for Machine Learning", equations 2.25, 2.26 and 5.8; constant mean by equation 2.41).
   Its fit draws a lucky trial back to what its neighbours score. Noise is at least the known
   standard error of a difference between trials on the same items; what scatters beyond that is
   taken for real.
2. *Validation* scores then update it. They count by the covariance of their paired differences, and
   only their differences count, since validation items may be harder than search items.

What the search's items have in common with the fit is not removed by it, so anchors, which no
search has fitted to items, are never compared with nominees by this posterior; see
:func:`mergesearch.search.study.selection.choose_winner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.search.front import Normaliser, signs, to_losses
from mergesearch.search.record.trial_record import Score, TrialRecord

Array = npt.NDArray[np.float64]

#: Trials around the recommendation that the fit uses, and the fewest that it is made from.
MOST_TRIALS = 200
FEWEST_TRIALS = 12
#: Length scales that are tried, in units of the median distance, and shares of signal to noise.
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
SIGNALS = np.logspace(-3, 4, 15)


def posterior_losses(
    records: Sequence[TrialRecord],
    leaders: Sequence[int],
    validation: Mapping[int, Score],
    objectives: Sequence[Objective],
    weights: Array,
    normaliser: Normaliser,
    width: Array,
) -> dict[int, float] | None:
    """Leader -> posterior mean of its weighted loss, up to a constant that all of them share.

    Args:
        records: Every trial.
        leaders: Numbers of the nominees, the recommendation first.
        validation: Their scores on validation items.
        objectives: The study's.
        weights: Importance of each objective, summing to 1, ``(objectives,)``.
        normaliser: Scale of the objectives.
        width: Length of each side of the box, ``(dim,)``.

    Returns:
        None where the search has too few complete trials to learn from, or where no standard errors
        are known.
    """
    numbers = [number for number in leaders if number in validation]
    complete = [r for r in records if r.state == "complete" and r.point is not None]
    searched = [record for record in complete if record.kind != "anchor"]
    if not numbers or len(searched) < FEWEST_TRIALS:
        return None
    near = _nearest([records[number] for number in numbers], searched, width)
    slopes = weights / (normaliser.high - normaliser.low)
    covariance = _covariance(near, objectives, slopes)
    scores = [validation[number] for number in numbers]
    noise = _covariance(scores, objectives, slopes)
    if covariance is None or noise is None:
        return None
    losses = _losses(near, objectives, weights, normaliser)
    known = _noise_of_differences(covariance)
    mean, spread = fit_nominees(_scaled(near, width), losses, len(numbers), known)
    values = update(mean, spread, _losses(scores, objectives, weights, normaliser), noise)
    return dict(zip(numbers, values.tolist(), strict=True))


def fit_nominees(points: Array, losses: Array, count: int, noise: float) -> tuple[Array, Array]:
    """The true losses of the first ``count`` trials given all of them: mean and covariance.

    Args:
        points: Trials ``(trials, dim)``.
        losses: As measured ``(trials,)``.
        count: Number of nominees, which come first.
        noise: Variance of a measured loss beside what all trials share.
    """
    from scipy.spatial.distance import cdist

    squares = cdist(points, points, "sqeuclidean")
    kernel, total = _likeliest_kernel(squares, losses, noise)
    # The scatter that 200 trials leave undecided is counted as noise.
    undecided = noise * 2 * np.sqrt(2 / len(losses))
    real = max(total - noise - undecided, 0.0)
    prior = kernel + real * np.eye(len(losses))
    inverse = np.linalg.inv(kernel + total * np.eye(len(losses)))
    ones = inverse.sum(axis=1)
    level = float(ones @ losses / ones.sum())
    cross = prior[:count] @ inverse  # equations 2.25 and 2.26
    rest = 1 - cross.sum(axis=1)
    mean = level + cross @ (losses - level)
    spread = prior[:count, :count] - cross @ prior[:, :count] + np.outer(rest, rest) / ones.sum()
    return np.asarray(mean), np.asarray(spread)


def update(mean: Array, spread: Array, values: Array, noise: Array) -> Array:
    """Posterior mean ``(nominees,)`` after a measurement whose common level is unknown.

    Args:
        mean, spread: The prior: ``(nominees,)`` and ``(nominees, nominees)``.
        values: Measured losses ``(nominees,)``.
        noise: Their covariance ``(nominees, nominees)``.
    """
    count = len(mean)
    gaps = np.eye(count) - 1 / count
    # Differences to the mean of all nominees; the pseudo-inverse drops their common level.
    gain = spread @ gaps @ np.linalg.pinv(gaps @ (spread + noise) @ gaps, rcond=1e-9)
    return np.asarray(mean + gain @ gaps @ (values - mean))


def _likeliest_kernel(squares: Array, losses: Array, noise: float) -> tuple[Array, float]:
    """Covariance of the smooth part, and the variance of the rest, by restricted likelihood."""
    count = len(losses)
    unit = float(np.median(squares[np.triu_indices(count, 1)])) or 1.0
    best = (np.inf, np.zeros_like(squares), noise)
    for length in LENGTHS:
        shape = np.exp(-0.5 * squares / (unit * length**2))
        roots, vectors = np.linalg.eigh(shape)
        turned = vectors.T @ losses
        ones = vectors.sum(axis=0)
        for signal in SIGNALS:
            diagonal = signal * np.maximum(roots, 0.0) + 1
            information = float(np.sum(ones**2 / diagonal))
            level = float(np.sum(ones * turned / diagonal)) / information
            square = float(np.sum((turned - ones * level) ** 2 / diagonal))
            rest = max(square / (count - 1), noise, 1e-300)
            cost = (count - 1) * np.log(rest) + np.log(diagonal).sum() + square / rest
            cost += np.log(information)
            if cost < best[0]:
                best = (cost, signal * rest * shape, rest)
    return best[1], best[2]


def _nearest(
    nominees: Sequence[TrialRecord], searched: Sequence[TrialRecord], width: Array
) -> list[TrialRecord]:
    """The nominees, then the trials that lie nearest to the first of them."""
    points = _scaled([*nominees[:1], *searched], width)
    order = np.argsort(np.sum((points[1:] - points[0]) ** 2, axis=1), kind="stable")
    numbers = {record.number for record in nominees}
    others = [searched[row] for row in order if searched[row].number not in numbers]
    return [*nominees, *others[:MOST_TRIALS]]


def _scaled(records: Sequence[TrialRecord], width: Array) -> Array:
    """Points ``(trials, dim)`` in units of the box; coordinates that are fixed count nothing."""
    points = np.array([record.point for record in records])
    return np.asarray(points / np.where(width > 0, width, 1.0))


def _losses(
    measured: Sequence[TrialRecord | Score],
    objectives: Sequence[Objective],
    weights: Array,
    normaliser: Normaliser,
) -> Array:
    """Weighted losses ``(trials,)``."""
    losses = np.array([to_losses(each.values, objectives) for each in measured])
    return normaliser.scalarise(losses, weights)


def _covariance(
    measured: Sequence[TrialRecord | Score], objectives: Sequence[Objective], slopes: Array
) -> Array | None:
    """Covariance ``(trials, trials)`` of the weighted losses over items; None where unknown."""
    total = np.zeros((len(measured), len(measured)))
    blocks = []
    for objective, slope in zip(objectives, signs(objectives) * slopes, strict=True):
        items = _items(measured, objective.name)
        if items is not None:
            blocks.append(slope * items)
            continue
        errors = [each.errors.get(objective.name, np.nan) for each in measured]
        if not np.isfinite(errors).all():
            return None
        total += np.diag((slope * np.array(errors)) ** 2)
    if len({block.shape[1] for block in blocks}) == 1:
        blocks = [np.sum(blocks, axis=0)]  # objectives on the same items may be correlated
    for block in blocks:
        total += np.cov(block).reshape(total.shape) / block.shape[1]
    return total if total.any() else None


def _items(measured: Sequence[TrialRecord | Score], name: str) -> Array | None:
    """Scores of the same items ``(trials, items)``; None where they do not make up the values."""
    rows = [each.items.get(name, np.empty(0)) for each in measured]
    if len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return None
    items = np.array(rows, dtype=np.float64)
    values = np.array([each.values[name] for each in measured])
    # Logs keep items in single precision.
    size = np.maximum(np.abs(values), 1.0)
    return items if np.all(np.abs(items.mean(axis=1) - values) < 1e-5 * size) else None


def _noise_of_differences(covariance: Array) -> float:
    """Half the mean variance of a difference between two trials.

    That of trials that score alike on every item may round to less than none.
    """
    count = len(covariance)
    return max(float((np.trace(covariance) - covariance.sum() / count) / (count - 1)), 0.0)
