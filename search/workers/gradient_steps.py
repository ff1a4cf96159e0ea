"""Gradient steps of a trial: plain data that travels to a worker, the steps themselves, and what
comes back.

A trial with a :class:`GradientSteps` is measured at its point first and then walks on from there.
What comes back is where it stands (:class:`OptimizerState`); the next trial of that walk begins
there, so every recorded point is one that was measured or can be. The walk is a function of the
configuration and of the gradients alone: whoever repeats it arrives at the same state.

No steps at all only takes the gradient, for strategies that average the shares of several
workers, or that use gradients in other ways than to step along them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Batch
from mergesearch.merging import NonFiniteError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

#: Coordinates nearer to the origin than this count as at it: a logit and back is not exact.
AT_ORIGIN = 1e-12
#: Where a coordinate on a bound lies for the logistic function, as a share of the range.
EDGE = 1e-6

#: (point, batch) -> loss and gradient ``(dim,)`` there.
SlopeAt = Callable[[Array, Batch], tuple[float, Array]]


@dataclass(frozen=True, eq=False)
class OptimizerConfig:
    """How steps are made; constant during a walk but for the learning rate.

    Attributes:
        lower, upper: The box, float64 ``(dim,)``.
        origin: Where the pull leads, ``(dim,)``.
        weights: Objective -> weight in the loss that is followed.
        optimiser: ``adam`` (Kingma 2015), ``adamw`` (Loshchilov 2019) or ``sgd``, as torch has
            them.
        learning_rate: Of the optimiser.
        weight_decay: Of the optimiser.
        clip: Largest norm of a gradient, or None.
        period: Steps of the first cycle of a cosine that falls to a tenth and restarts, each cycle
            twice as long as the one before (Loshchilov 2017, "SGDR: stochastic gradient descent
            with warm restarts"); None: constant rate.
        coordinates: ``box``: steps are taken in the point and clipped to the box; ``logit``: in the
            logits of the point's place between the bounds, which never reaches them.
        l1_to_start: Weight of ``Σ |point - origin|``.
        trainable: Coordinates that move, bool ``(dim,)``; None: all.
        tied: Number of the coefficient that each coordinate is part of, int ``(dim,)``: parts move
            as one, along the sum of their gradients; None: each by itself.
        batches: Batches whose gradients are averaged for one step.
        batch: Which items; its number is that of the first batch of the first step.
        measure: ``gradient``, or ``cosine``: sums of cosines between gradient and experts, for the
            rule of Frank-Wolfe merging; then there are no steps.
    """

    lower: Array
    upper: Array
    origin: Array
    weights: Mapping[str, float]
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = None
    period: int | None = None
    coordinates: Literal["box", "logit"] = "box"
    l1_to_start: float = 0.0
    trainable: npt.NDArray[np.bool_] | None = None
    tied: npt.NDArray[np.intp] | None = None
    batches: int = 1
    batch: Batch = field(default_factory=Batch)
    measure: Literal["gradient", "cosine"] = "gradient"


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Where a walk stands.

    Attributes:
        raw: The coordinates in which steps are taken ``(dim,)``: the point, or its logits.
        moments: Adam's first and second moment of the gradients ``(2, dim)``; zero under ``sgd``.
        count: Steps taken.
    """

    raw: Array
    moments: Array
    count: int = 0


@dataclass(frozen=True, eq=False)
class GradientSteps:
    """What a worker does after it has measured a trial's point.

    Attributes:
        rule: How steps are made.
        state: Where the walk stands at the trial's point.
        steps: Steps to take; 0 takes the gradient of one step's batches.
    """

    rule: OptimizerConfig
    state: OptimizerState
    steps: int

    @property
    def batches(self) -> int:
        """Batches that are looked at."""
        return max(self.steps, 1) * self.rule.batches


@dataclass(frozen=True, eq=False)
class GradientResult:
    """What comes back.

    Attributes:
        losses: Loss before each step ``(steps,)``, or the one where only the gradient was taken.
        state: Where the walk stands after its steps; None where there were none.
        gradient: The gradient ``(dim,)`` where there were no steps (or its cosines), else None.
    """

    losses: tuple[float, ...]
    state: OptimizerState | None = None
    gradient: Array | None = None


def init_state(rule: OptimizerConfig, point: Array) -> OptimizerState:
    """The state of a walk that begins at ``point`` ``(dim,)``."""
    return OptimizerState(_raw(rule, point), np.zeros((2, point.size)))


def point_of(rule: OptimizerConfig, state: OptimizerState) -> Array:
    """The point ``(dim,)`` of a state."""
    if rule.coordinates == "box":
        return np.clip(state.raw, rule.lower, rule.upper)
    with np.errstate(over="ignore"):
        share = 1.0 / (1.0 + np.exp(-state.raw))
    return np.clip(rule.lower + (rule.upper - rule.lower) * share, rule.lower, rule.upper)


def take_gradient_steps(
    gradient_steps: GradientSteps, point: Array, loss_and_gradient_at: SlopeAt
) -> GradientResult:
    """Take the steps from the trial's point.

    Args:
        gradient_steps: What to do.
        point: The trial's point ``(dim,)``; its state's, but for the rounding of a logit.
        loss_and_gradient_at: Loss and gradient.

    Raises:
        NonFiniteError: If a gradient is not finite.
    """
    rule = gradient_steps.rule
    state = gradient_steps.state
    losses = []
    for _ in range(max(gradient_steps.steps, 1)):
        loss, gradient = _slope(rule, state, point, loss_and_gradient_at)
        losses.append(loss)
        if not gradient_steps.steps:
            return GradientResult(tuple(losses), gradient=gradient)
        state = step(rule, state, gradient, point)
        point = point_of(rule, state)
    return GradientResult(tuple(losses), state)


def step(
    rule: OptimizerConfig, state: OptimizerState, gradient: Array, point: Array
) -> OptimizerState:
    """The state after one step along a gradient ``(dim,)`` of the loss with respect to the point.

    Args:
        rule: How steps are made.
        state: Before the step.
        gradient: At ``point``, without pull.
        point: The point of the state.
    """
    import torch

    width = rule.upper - rule.lower
    if rule.tied is not None:
        gradient = np.asarray(np.bincount(rule.tied, gradient)[rule.tied], np.float64)
    pulled = gradient + rule.l1_to_start * _direction(point - rule.origin)
    moving = np.where(_free(rule), pulled, 0.0)
    if rule.coordinates == "logit":
        share = np.divide(point - rule.lower, width, out=np.zeros_like(point), where=width > 0)
        moving = moving * width * share * (1.0 - share)
    if rule.clip is not None:
        moving = moving * min(1.0, rule.clip / max(float(np.linalg.norm(moving)), 1e-300))
    raw = torch.from_numpy(state.raw.copy())
    raw.grad = torch.from_numpy(moving)
    moments = torch.from_numpy(state.moments.copy())
    _step(rule, raw, moments, state.count)
    stepped: Array = np.where(_free(rule), raw.numpy(), state.raw)
    if rule.coordinates == "box":
        stepped = np.clip(stepped, rule.lower, rule.upper)
    return OptimizerState(stepped, moments.numpy(), state.count + 1)


def rate(rule: OptimizerConfig, count: int) -> float:
    """Learning rate of the step after ``count`` steps (Loshchilov 2017, Eq. 5)."""
    if rule.period is None:
        return rule.learning_rate
    period = rule.period
    while count >= period:
        count = count - period
        period = 2 * period
    low = 0.1 * rule.learning_rate
    return low + (rule.learning_rate - low) * (1.0 + math.cos(math.pi * count / period)) / 2.0


def mean_gradient(parts: list[Array]) -> Array:
    """The gradient of a batch from those of its shares, in their order."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def _step(rule: OptimizerConfig, raw: torch.Tensor, moments: torch.Tensor, count: int) -> None:
    """One step of torch's optimiser in place, its state handed in and taken out."""
    import torch

    step_size = rate(rule, count)
    decay = rule.weight_decay
    if rule.optimiser == "sgd":
        torch.optim.SGD([raw], lr=step_size, weight_decay=decay).step()
        return
    kind = torch.optim.AdamW if rule.optimiser == "adamw" else torch.optim.Adam
    optimiser = kind([raw], lr=step_size, weight_decay=decay)
    known = {"step": torch.tensor(float(count)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    optimiser.state[raw] = known
    optimiser.step()
    moments[0] = known["exp_avg"]
    moments[1] = known["exp_avg_sq"]


def _slope(
    rule: OptimizerConfig, state: OptimizerState, point: Array, loss_and_gradient_at: SlopeAt
) -> tuple[float, Array]:
    """Mean loss and gradient over the batches of the next step."""
    total = 0.0
    gradients = []
    for number in range(state.count * rule.batches, (state.count + 1) * rule.batches):
        loss, gradient = loss_and_gradient_at(
            point, replace(rule.batch, number=rule.batch.number + number)
        )
        if not np.all(np.isfinite(gradient)):
            raise NonFiniteError("gradient of the coefficients")
        total += loss
        gradients.append(gradient)
    return total / rule.batches, mean_gradient(gradients)


def _raw(rule: OptimizerConfig, point: Array) -> Array:
    if rule.coordinates == "box":
        return point.astype(np.float64, copy=True)
    width = rule.upper - rule.lower
    share = np.divide(point - rule.lower, width, out=np.full_like(point, 0.5), where=width > 0)
    share = np.clip(share, EDGE, 1.0 - EDGE)
    return np.asarray(np.log(share / (1.0 - share)))


def _direction(offset: Array) -> Array:
    return np.where(np.abs(offset) <= AT_ORIGIN, 0.0, np.sign(offset))


def _free(rule: OptimizerConfig) -> npt.NDArray[np.bool_]:
    moves = rule.upper > rule.lower
    return moves if rule.trainable is None else moves & rule.trainable
