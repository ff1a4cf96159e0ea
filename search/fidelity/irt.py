"""Estimates of a score on all items from its scores on some, by item response theory.

Mencattini 2025, "MERGE³: Efficient Evolutionary Merging on Consumer-grade GPUs" (arXiv 2502.10436),
after Maia Polo 2024, "tinyBenchmarks: evaluating LLMs with fewer examples" (arXiv 2402.14992).
Differences to these papers:

* Item parameters are fitted to the study's own responses (anchors and complete trials), not read
  from a file for one benchmark; abilities and item parameters together, with normal priors, since
  there are few models.
* Weights of the experts' abilities lie in [-0.5, 1.5] and are drawn to equal ones: unbounded they
  run away on few items.

All of these are estimates. Strategies are told them, and reports call them estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Most abilities of a model.
ABILITIES = 4
#: Standard deviations of the priors: abilities, discriminations, difficulties; and of weights
#: around equal ones.
ABILITY = 1.0
DISCRIMINATION = 1.0
DIFFICULTY = 2.0
WEIGHT = 0.5
#: Logits beyond this are as good as certain.
CERTAIN = 30.0
#: Share of the plain mean in the generalised estimators (MERGE³'s c).
SHARE = 0.5


@dataclass(frozen=True, eq=False)
class ItemModel:
    """P(right) = σ(a · θ − b) (MERGE³, eq. 2: multidimensional two-parameter logistic).

    Attributes:
        discrimination: a, ``(items, abilities)``.
        difficulty: b, ``(items,)``.
        abilities: θ of the models that it was fitted to, ``(models, abilities)``.
    """

    discrimination: Array
    difficulty: Array
    abilities: Array

    def predict(self, ability: Array) -> Array:
        """Chance of a right answer to every item ``(items,)``."""
        return _sigmoid(self.discrimination @ ability - self.difficulty)


def estimate(
    kind: str, model: ItemModel, parents: Mask, observed: Array, indices: npt.NDArray[np.intp]
) -> float:
    """Mean score on all items, estimated from some.

    Args:
        kind: ``p_irt`` (the merge has an ability of its own), ``mp_irt`` (a weighted sum of those
            of base and experts), ``gp_irt`` and ``gmp_irt`` (their mean with the plain mean of the
            observed scores).
        model: Fitted to complete responses of other models.
        parents: Which of those models are base and experts, ``(models,)``.
        observed: The merge's scores ``(m,)``.
        indices: Of the items that were observed ``(m,)``.
    """
    if kind in ("mp_irt", "gmp_irt"):
        ability = _mixed_ability(model, model.abilities[parents], observed, indices)
    else:
        ability = _own_ability(model, observed, indices)
    predicted = model.predict(ability)
    share = len(observed) / len(predicted)
    unseen = np.delete(predicted, indices)
    # p-IRT (Maia Polo 2024, eq. 4): observed items as observed, the others as predicted.
    mean = float(share * observed.mean() + (1 - share) * (unseen.mean() if unseen.size else 0.0))
    if kind in ("gp_irt", "gmp_irt"):
        mean = SHARE * float(observed.mean()) + (1 - SHARE) * mean
    return mean


def choose_representatives(scores: Array, count: int) -> tuple[npt.NDArray[np.intp], Array]:
    """Choose items that stand for all, and their weights.

    The medians of clusters of items that the same models answer alike (Vivek 2024, "Anchor Points:
    Benchmarking Models with Much Fewer Examples"; Maia Polo 2024, section 3); k-means with a fixed
    seed.

    Args:
        scores: Of known models ``(models, items)``.
        count: Number of items; fewer come back where items are answered in fewer ways.

    Returns:
        Rising indices ``(count,)``, and the share of all items that each stands for ``(count,)``.
    """
    from scipy.cluster.vq import kmeans2

    points = scores.T + 0.0
    centres, owners = kmeans2(points, count, minit="++", rng=np.random.default_rng(0))
    indices = []
    weights = []
    for cluster in range(count):
        members = np.flatnonzero(owners == cluster)
        if members.size:
            distances = np.sum((points[members] - centres[cluster]) ** 2, axis=1)
            indices.append(members[int(np.argmin(distances))])
            weights.append(members.size / len(points))
    order = np.argsort(indices)
    return np.array(indices)[order], np.array(weights)[order]


def fit_items(scores: Array) -> ItemModel:
    """Fit the most probable item parameters and abilities.

    Args:
        scores: Responses between 0 and 1, ``(models, items)``.
    """
    from scipy.optimize import minimize

    models, items = scores.shape
    count = int(np.clip(models - 1, 1, ABILITIES))
    start = _first_guess(scores, count)

    def loss_and_gradient(flat: Array) -> tuple[float, Array]:
        theta, a, b = _unpacked(flat, models, items, count)
        logits = theta @ a.T - b
        gap = _sigmoid(logits) - scores
        likelihood = np.sum(np.logaddexp(0.0, logits) - scores * logits)
        priors = (
            np.sum(theta**2) / ABILITY**2
            + np.sum(a**2) / DISCRIMINATION**2
            + np.sum(b**2) / DIFFICULTY**2
        )
        matrices = [gap @ a + theta / ABILITY**2, gap.T @ theta + a / DISCRIMINATION**2]
        gradient = np.concatenate(
            [*(matrix.ravel() for matrix in matrices), -gap.sum(axis=0) + b / DIFFICULTY**2]
        )
        return float(likelihood + priors / 2), gradient

    solution = minimize(
        loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}
    )
    theta, a, b = _unpacked(solution.x, models, items, count)
    return ItemModel(a, b, theta)


def _first_guess(scores: Array, count: int) -> Array:
    """Starting parameters, from the leading singular vectors of the smoothed log odds."""
    smooth = np.log((scores + 0.5) / (1.5 - scores))
    difficulty = -smooth.mean(axis=0)
    left, values, right = np.linalg.svd(smooth + difficulty, full_matrices=False)
    root = np.sqrt(values[:count])
    theta = np.zeros((len(scores), count))
    a = np.zeros((scores.shape[1], count))
    theta[:, : len(root)] = left[:, :count] * root
    a[:, : len(root)] = right[:count].T * root
    return np.concatenate([theta.ravel(), a.ravel(), difficulty])


def _unpacked(flat: Array, models: int, items: int, count: int) -> tuple[Array, Array, Array]:
    """Abilities, discriminations and difficulties in a flat vector of parameters."""
    first = models * count
    second = (models + items) * count
    theta = flat[:first].reshape(models, count)
    a = flat[first:second].reshape(items, count)
    return theta, a, flat[second:]


def _own_ability(model: ItemModel, observed: Array, indices: npt.NDArray[np.intp]) -> Array:
    """Most probable θ of observed answers."""
    from scipy.optimize import minimize

    a = model.discrimination[indices]
    b = model.difficulty[indices]

    def loss_and_gradient(theta: Array) -> tuple[float, Array]:
        logits = a @ theta - b
        gap = _sigmoid(logits) - observed
        likelihood = np.sum(np.logaddexp(0.0, logits) - observed * logits)
        loss = float(likelihood + np.sum(theta**2) / (2 * ABILITY**2))
        return loss, a.T @ gap + theta / ABILITY**2

    start = model.abilities.mean(axis=0)
    return np.asarray(minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x)


def _mixed_ability(
    model: ItemModel, parents: Array, observed: Array, indices: npt.NDArray[np.intp]
) -> Array:
    """θ = Σ λ_i θ_i of base and experts (MERGE³, eq. 6), with the most probable λ.

    Args:
        model: The items' parameters.
        parents: Abilities of base and experts ``(parents, abilities)``.
        observed: Scores ``(m,)``.
        indices: Of the items that were observed ``(m,)``.
    """
    from scipy.optimize import minimize

    a = model.discrimination[indices] @ parents.T
    b = model.difficulty[indices]
    equal = np.full(len(parents), 1 / len(parents))

    def loss_and_gradient(weights: Array) -> tuple[float, Array]:
        logits = a @ weights - b
        gap = _sigmoid(logits) - observed
        offset = weights - equal
        likelihood = np.sum(np.logaddexp(0.0, logits) - observed * logits)
        loss = float(likelihood + np.sum(offset**2) / (2 * WEIGHT**2))
        return loss, a.T @ gap + offset / WEIGHT**2

    bounds = [(-0.5, 1.5)] * len(parents)
    solution = minimize(loss_and_gradient, equal, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(solution.x @ parents)


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -CERTAIN, CERTAIN))))
