"""Gradient steps of a trial: what a worker is sent, the steps themselves, and their result.

A trial with a :class:`GradientSteps` is measured at its point first and then walks on from there.
Its result says where the walk stands (:class:`OptimizerState`); the next trial of that walk begins
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

#: A gradient costs as much as so many evaluations of its batch: forward, and twice that back.
GRADIENT_COST = 3
#: Coordinates nearer to the origin than this count as at it: a logit and back is not exact.
AT_ORIGIN = 1e-12
#: Where a coordinate on a bound lies for the logistic function, as a share of the range.
EDGE = 1e-6

#: (point, batch) -> loss and gradient ``(dim,)`` there.
LossAndGradientAt = Callable[[Array, Batch], tuple[float, Array]]


@dataclass(frozen=True, eq=False)
class OptimizerConfig:
    """How steps are made; constant during a walk but for the learning rate.

    Attributes:
        lower, upper: The box, float64 ``(dim,)``.
        origin: The point that ``l1_to_start`` pulls to ``(dim,)``.
        weights: Objective -> weight in the loss that is followed.
        optimizer: ``adam`` (Kingma 2015) or ``adamw`` (Loshchilov 2019), as in torch.
        learning_rate: Of the optimizer.
        weight_decay: Of the optimizer.
        clip: Largest norm of a gradient, or None.
        period: Steps of the first cycle of a cosine that falls to a tenth and restarts, each cycle
            twice as long as the one before (Loshchilov 2017, "SGDR: stochastic gradient descent
            with warm restarts"); None: constant rate.
        coordinates: ``box``: steps are taken in the point and clipped to the box; ``logit``: in the
            logits of the point's position between the bounds, which never reaches them.
        l1_to_start: Weight of ``Σ |point - origin|``.
        trainable: Coordinates that move, bool ``(dim,)``; None: all.
        tied: Number of the coefficient that each coordinate is part of, int ``(dim,)``: parts move
            as one, along the sum of their gradients; None: each by itself.
        batch: Which items; its number is that of the first step's batch.
        measure: ``gradient``, or ``cosine``: sums of cosines between gradient and experts, for the
            config of Frank-Wolfe merging; then there are no steps.
    """

    lower: Array
    upper: Array
    origin: Array
    weights: Mapping[str, float]
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = None
    period: int | None = None
    coordinates: Literal["box", "logit"] = "box"
    l1_to_start: float = 0.0
    trainable: npt.NDArray[np.bool_] | None = None
    tied: npt.NDArray[np.intp] | None = None
    batch: Batch = field(default_factory=Batch)
    measure: Literal["gradient", "cosine"] = "gradient"


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Where a walk stands.

    Attributes:
        raw: The coordinates in which steps are taken ``(dim,)``: the point, or its logits.
        moments: Adam's first and second moment of the gradients ``(2, dim)``.
        count: Steps taken.
    """

    raw: Array
    moments: Array
    count: int = 0


@dataclass(frozen=True, eq=False)
class GradientSteps:
    """What a worker does after it has measured a trial's point.

    Attributes:
        config: How steps are made.
        state: Where the walk stands at the trial's point.
        steps: Steps to take; 0 only takes the gradient of one step's batch.
    """

    config: OptimizerConfig
    state: OptimizerState
    steps: int

    @property
    def batches(self) -> int:
        """Number of batches that are evaluated: one for each step, and at least one."""
        return max(self.steps, 1)


@dataclass(frozen=True, eq=False)
class GradientResult:
    """The result of a trial's gradient steps.

    Attributes:
        losses: Loss before each step ``(steps,)``; a single one where only the gradient was taken.
        state: Where the walk stands after its steps; None where there were none.
        gradient: Where there were no steps, the gradient or its cosines ``(dim,)``; else None.
    """

    losses: tuple[float, ...]
    state: OptimizerState | None = None
    gradient: Array | None = None


def init_state(config: OptimizerConfig, point: Array) -> OptimizerState:
    """The state of a walk that begins at ``point`` ``(dim,)``."""
    return OptimizerState(_coordinates_of(config, point), np.zeros((2, point.size)))


def point_of(config: OptimizerConfig, state: OptimizerState) -> Array:
    """The point ``(dim,)`` of a state."""
    if config.coordinates == "box":
        return np.clip(state.raw, config.lower, config.upper)
    with np.errstate(over="ignore"):
        share = 1.0 / (1.0 + np.exp(-state.raw))
    return np.clip(config.lower + (config.upper - config.lower) * share, config.lower, config.upper)


def take_gradient_steps(
    gradient_steps: GradientSteps, point: Array, loss_and_gradient_at: LossAndGradientAt
) -> GradientResult:
    """Take the steps from the trial's point.

    Args:
        gradient_steps: What to do.
        point: The trial's point ``(dim,)``; that of the state but for the rounding of a logit.
        loss_and_gradient_at: Loss and gradient of a batch at a point.

    Raises:
        NonFiniteError: If a gradient is not finite.
    """
    config = gradient_steps.config
    state = gradient_steps.state
    losses = []
    for _ in range(max(gradient_steps.steps, 1)):
        batch = replace(config.batch, number=config.batch.number + state.count)
        loss, gradient = loss_and_gradient_at(point, batch)
        if not np.all(np.isfinite(gradient)):
            raise NonFiniteError("gradient of the coefficients")
        losses.append(loss)
        if not gradient_steps.steps:
            return GradientResult(tuple(losses), gradient=gradient.copy())
        state = optimizer_step(config, state, gradient, point)
        point = point_of(config, state)
    return GradientResult(tuple(losses), state)


def optimizer_step(
    config: OptimizerConfig, state: OptimizerState, gradient: Array, point: Array
) -> OptimizerState:
    """The state after one step along a gradient of the loss.

    Args:
        config: How steps are made.
        state: Before the step.
        gradient: Of the loss alone, with respect to ``point`` ``(dim,)``.
        point: The point of the state ``(dim,)``.
    """
    import torch

    width = config.upper - config.lower
    if config.tied is not None:
        # Parts of one coefficient: the chain rule sums their gradients.
        gradient = np.asarray(np.bincount(config.tied, gradient)[config.tied], np.float64)
    # d/dx (loss + l1_to_start · Σ |x − origin|)
    total = gradient + config.l1_to_start * _sign(point - config.origin)
    moving = np.where(_trainable(config), total, 0.0)
    if config.coordinates == "logit":
        # x = lower + width · s(z), s the logistic function: dx/dz = width · s (1 − s)
        share = np.divide(point - config.lower, width, out=np.zeros_like(point), where=width > 0)
        moving = moving * width * share * (1.0 - share)
    if config.clip is not None:
        moving = moving * min(1.0, config.clip / max(float(np.linalg.norm(moving)), 1e-300))
    raw = torch.from_numpy(state.raw.copy())
    raw.grad = torch.from_numpy(moving)
    moments = torch.from_numpy(state.moments.copy())
    _torch_step(config, raw, moments, state.count)
    stepped: Array = np.where(_trainable(config), raw.numpy(), state.raw)
    if config.coordinates == "box":
        stepped = np.clip(stepped, config.lower, config.upper)
    return OptimizerState(stepped, moments.numpy(), state.count + 1)


def rate(config: OptimizerConfig, count: int) -> float:
    """Learning rate of the step after ``count`` steps (Loshchilov 2017, eq. 5)."""
    if config.period is None:
        return config.learning_rate
    period = config.period
    while count >= period:
        count = count - period
        period = 2 * period
    # η = η_min + (η_max − η_min) (1 + cos(π T_cur / T_i)) / 2
    low = 0.1 * config.learning_rate
    return low + (config.learning_rate - low) * (1.0 + math.cos(math.pi * count / period)) / 2.0


def mean_gradient(parts: list[Array]) -> Array:
    """The gradient of a batch from those of its shares, in their order."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def _torch_step(
    config: OptimizerConfig, raw: torch.Tensor, moments: torch.Tensor, count: int
) -> None:
    """One step of torch's optimizer, in place in ``raw`` and ``moments``, both ``(..., dim)``."""
    import torch

    step_size = rate(config, count)
    decay = config.weight_decay
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind([raw], lr=step_size, weight_decay=decay)
    state = {"step": torch.tensor(float(count)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    optimizer.state[raw] = state
    optimizer.step()
    moments[0] = state["exp_avg"]
    moments[1] = state["exp_avg_sq"]


def _coordinates_of(config: OptimizerConfig, point: Array) -> Array:
    """The coordinates in which steps are taken ``(dim,)``: the point, or its logits."""
    if config.coordinates == "box":
        return point.astype(np.float64, copy=True)
    width = config.upper - config.lower
    share = np.divide(point - config.lower, width, out=np.full_like(point, 0.5), where=width > 0)
    share = np.clip(share, EDGE, 1.0 - EDGE)
    return np.asarray(np.log(share / (1.0 - share)))


def _sign(offset: Array) -> Array:
    """Signs ``(dim,)``; 0 within the rounding of a logit."""
    return np.where(np.abs(offset) <= AT_ORIGIN, 0.0, np.sign(offset))


def _trainable(config: OptimizerConfig) -> npt.NDArray[np.bool_]:
    """Coordinates that move, bool ``(dim,)``."""
    moves = config.upper > config.lower
    return moves if config.trainable is None else moves & config.trainable
