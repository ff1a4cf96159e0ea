"""The surrogate of MAP: a quadratic model of every objective, chosen by leave-one-out error.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation"
(arXiv 2406.07529): near the base an objective is ``act(e + b'c + 1/2 c'Ac)``, act being the
identity, a sigmoid or a softplus. What we changed:

* Ridge regression on the inverse of act, weighted by its squared slope (closed form, no local
  minima), instead of nonlinear least squares from an all-ones start. Gauss-Newton steps towards
  nonlinear least squares may follow.
* Several shapes of A, of which the one with the smallest leave-one-out error is taken. An
  unconstrained A is a saddle more often than not, and the best point of a saddle is wherever the
  box ends.
* The ridge is solved in the smaller of unknowns and points, so that a full A is affordable at any
  dimension. With fewer points than unknowns, A is a bowl plus a diagonal plus what the points
  themselves span.
* Points near the front may count for more: objectives are quadratic in a neighbourhood, not
  everywhere.

All links are increasing: A is positive semidefinite around the minimum of a loss, and the maximum
of a score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from mergesearch.search.strategies.parts.map_ridge import (
    GAINS,
    RIDGES,
    Array,
    OneSigned,
    Quadratic,
    Ridge,
    Shape,
)

#: Points at which the one-signed shape, which has no hat matrix, is left out.
LEFT_OUT = 48
#: Above this dimension A is not projected: an eigendecomposition for every left out point costs too
#: much.
PROJECTION_LIMIT = 64
#: Scores are clipped this far from 0 and 1 before the logit, losses this share of their spread from
#: 0.
CLIP = 0.005
#: Gauss-Newton steps at most.
POLISH_STEPS = 3


@dataclass(frozen=True)
class Link:
    """An increasing function from the quadratic to the loss.

    Attributes:
        name: ``identity``, ``logistic`` (loss = minus a score between 0 and 1) or ``softplus``
            (loss above 0).
        spread: Unit of a softplus loss.
    """

    name: Literal["identity", "logistic", "softplus"] = "identity"
    spread: float = 1.0

    def to_loss(self, latent: Array) -> Array:
        """The loss of a value of the quadratic."""
        if self.name == "logistic":
            return _sigmoid(latent) - 1.0
        return self.spread * np.logaddexp(0.0, latent) if self.name == "softplus" else latent

    def to_latent(self, losses: Array) -> Array:
        """The value of the quadratic for a loss, clipped away from the ends of the range."""
        if self.name == "logistic":
            error = np.clip(1.0 + losses, CLIP, 1.0 - CLIP)
            return np.asarray(np.log(error / (1.0 - error)))
        if self.name == "softplus":
            share = np.maximum(losses / self.spread, CLIP)
            return np.asarray(share + np.log(-np.expm1(-share)))
        return losses

    def slope(self, latent: Array) -> Array:
        """Derivative of :meth:`to_loss`."""
        if self.name == "logistic":
            return _sigmoid(latent) * _sigmoid(-latent)
        return self.spread * _sigmoid(latent) if self.name == "softplus" else np.ones_like(latent)


def _sigmoid(latent: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * latent)))


def links_for(losses: Array, sign: float) -> tuple[Link, ...]:
    """Links to choose from for the losses ``(n,)`` of an objective.

    ``sign`` is the factor from a score to its loss.
    """
    if sign < 0 and losses.min() >= -1.0 and losses.max() <= 0.0:
        return (Link("logistic"),)
    if losses.min() < 0.0 or losses.std() == 0.0:
        return (Link(),)
    return (Link(), Link("softplus", float(losses.std())))


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates in which models are fitted: ``u = (point - centre) / scale``, both ``(dim,)``."""

    centre: Array
    scale: Array

    @classmethod
    def of(cls, points: Array) -> Frame:
        """Mean and standard deviation of ``(n, dim)``.

        Coordinates that do not vary keep their unit.
        """
        spread = points.std(axis=0)
        return cls(points.mean(axis=0), np.where(spread > 1e-12, spread, 1.0))

    def offsets(self, points: Array) -> Array:
        """Points ``(n, dim)`` in these coordinates."""
        return np.asarray((points - self.centre) / self.scale)

    def points(self, offsets: Array) -> Array:
        """Inverse of :meth:`offsets`."""
        return np.asarray(self.centre + offsets * self.scale)


@dataclass(frozen=True, eq=False)
class Model:
    """The model of one objective.

    Attributes:
        frame: Coordinates of the quadratic.
        quadratic: Fitted in them.
        link: From the quadratic to the loss.
        shape: Shape of A.
        ridge: Relative to the largest eigenvalue of the design.
        left_out: Residual of each point when it is left out, in units of the loss ``(n,)``.
        error: Root mean square of these, weighted by the importance of the points.
    """

    frame: Frame
    quadratic: Quadratic
    link: Link
    shape: Shape
    ridge: float
    left_out: Array
    error: float

    def latent(self, points: Array) -> Array:
        """The quadratic at points ``(n, dim)``, ``(n,)``; smaller is better."""
        return self.quadratic(self.frame.offsets(points))

    def predict(self, points: Array) -> Array:
        """Losses ``(n,)`` at points ``(n, dim)``."""
        return self.link.to_loss(self.latent(points))

    def coefficients(self) -> Quadratic:
        """The quadratic in the coordinates of the points."""
        A = self.quadratic.A / np.outer(self.frame.scale, self.frame.scale)
        b = self.quadratic.b / self.frame.scale
        centre = self.frame.centre
        return Quadratic(
            float(self.quadratic.e - b @ centre + 0.5 * centre @ A @ centre), b - A @ centre, A
        )


def fit_model(
    points: Array, losses: Array, *, shape: Shape = "free", ridge: float = RIDGES[0]
) -> Model:
    """The fit of ``losses`` ``(n,)`` at ``points`` ``(n, dim)`` with the identity link.

    With the smallest ridge it goes through ``(dim + 1)(dim + 2) / 2`` points that a quadratic went
    through.
    """
    frame = Frame.of(points)
    design = Ridge.of(frame.offsets(points), shape)
    left_out = design.residuals(losses[None], np.array([ridge]))[0, 0]
    quadratic = design.quadratic(losses, ridge)
    return Model(
        frame, quadratic, Link(), shape, ridge, left_out, float(np.sqrt(np.mean(left_out**2)))
    )


def fit_models(
    points: Array,
    losses: Array,
    signs: Sequence[float] | Array,
    *,
    importance: Array | None = None,
    certainty: Array | None = None,
    polish: bool = False,
) -> tuple[Model, ...]:
    """A model of each objective; link, shape, ridge and weights have the least error.

    The error is that of the points left out, in units of the loss.

    Args:
        points: ``(n, dim)``, n at least 2.
        losses: ``(n, objectives)``.
        signs: Factor from a score to its loss, per objective.
        importance: How much the error at each point matters ``(n,)``; default: all the same.
        certainty: Inverse variances of losses up to factors ``(n, objectives)``; default likewise.
        polish: Follow the closed form by Gauss-Newton steps, where these lower the error.
    """
    frame = Frame.of(points)
    importance = np.ones(len(points)) if importance is None else importance
    certainty = np.ones(losses.shape) if certainty is None else certainty
    designs = _Designs(frame.offsets(points))
    return tuple(
        _choose(frame, designs, _Objective(column, links_for(column, s), importance * c, c), polish)
        for column, s, c in zip(losses.T, signs, certainty.T, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Objective:
    """Losses ``(n,)``, links to choose from, importance and certainty ``(n,)``."""

    losses: Array
    links: tuple[Link, ...]
    importance: Array
    certainty: Array

    def error(self, left_out: Array) -> Array:
        """Weighted root mean square of residuals ``(..., n)``."""
        return np.asarray(np.sqrt(left_out**2 @ self.importance / self.importance.sum()))


@dataclass(eq=False)
class _Designs:
    """Designs by shape and weights: objectives with the same weights share them."""

    offsets: Array
    made: dict[tuple[Shape, bytes], Ridge] = field(default_factory=dict)

    def __call__(self, shape: Shape, weights: Array) -> Ridge:
        key = (shape, weights.tobytes())
        if key not in self.made:
            self.made[key] = Ridge.of(self.offsets, shape, weights)
        return self.made[key]


@dataclass(frozen=True, eq=False)
class _Fit:
    """One way to fit an objective, and its error.

    Attributes:
        nearness: Weights before the slope of the link, ``(n,)``.
        weights: Weights of the points ``(n,)``.
        target: What the quadratic is fitted to ``(n,)``.
        ridge, left_out, error: As in the model.
    """

    link: Link
    shape: Shape
    nearness: Array
    weights: Array
    target: Array
    ridge: float
    left_out: Array
    error: float


def _choose(frame: Frame, designs: _Designs, objective: _Objective, polish: bool) -> Model:
    best = min(_fits(designs, objective), key=lambda fit: fit.error)
    if polish and best.link.name != "identity":
        best = _polish(designs, objective, best)
    quadratic = designs(best.shape, best.weights).quadratic(best.target, best.ridge)
    model = Model(frame, quadratic, best.link, best.shape, best.ridge, best.left_out, best.error)
    can_project = best.shape == "free" and designs.offsets.shape[1] <= PROJECTION_LIMIT
    return _project(designs, objective, best, model) if can_project else model


def _fits(designs: _Designs, objective: _Objective) -> Iterator[_Fit]:
    """Fits with every link, weighting and shape."""
    for link in objective.links:
        target = link.to_latent(objective.losses)
        for nearness in (objective.certainty, objective.importance):
            for shape in GAINS:
                yield _fit(designs, objective, link, shape, nearness, link.slope(target), target)


def _fit(
    designs: _Designs,
    objective: _Objective,
    link: Link,
    shape: Shape,
    nearness: Array,
    slope: Array,
    target: Array,
) -> _Fit:
    """The fit with the best ridge."""
    weights = nearness * slope**2
    rests = designs(shape, weights).residuals(target[None], RIDGES)[0]
    left_out = objective.losses - link.to_loss(target - rests)
    errors = objective.error(left_out)
    best = int(np.argmin(errors))
    return _Fit(
        link,
        shape,
        nearness,
        weights,
        target,
        float(RIDGES[best]),
        left_out[best],
        float(errors[best]),
    )


def _polish(designs: _Designs, objective: _Objective, best: _Fit) -> _Fit:
    """Gauss-Newton steps, each of which is a weighted ridge regression.

    They lower Σ (act(q) − loss)²: target = q + (loss − act(q)) / act'(q), weights act'(q)².
    """
    link = best.link
    for _ in range(POLISH_STEPS):
        latent = designs(best.shape, best.weights).quadratic(best.target, best.ridge)(
            designs.offsets
        )
        slope = np.maximum(link.slope(latent), 1e-3 * link.spread)
        target = latent + (objective.losses - link.to_loss(latent)) / slope
        step = _fit(designs, objective, link, best.shape, best.nearness, slope, target)
        if step.error >= best.error:
            break
        best = step
    return best


def _project(designs: _Designs, objective: _Objective, fit: _Fit, model: Model) -> Model:
    """The one-signed model, if it errs no more than the free one.

    The errors are those at the points where both are left out.
    """
    rows = np.unique(np.linspace(0, len(fit.target) - 1, LEFT_OUT).astype(np.intp))
    projected = OneSigned(designs("free", fit.weights), designs("linear", fit.weights))
    rests = projected.residuals(fit.target, fit.ridge, rows)
    share = replace(objective, importance=objective.importance[rows])
    before = share.error(fit.left_out[rows])
    after = share.error(objective.losses[rows] - fit.link.to_loss(fit.target[rows] - rests))
    if after > before * (1.0 + 1e-9):
        return model
    error = model.error * float(after / before) if before > 0 else model.error
    return replace(
        model, quadratic=projected.quadratic(fit.target, fit.ridge), shape="one-signed", error=error
    )
