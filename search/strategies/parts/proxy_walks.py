"""Walks along gradients of proxies: how long, on which loss, and where they have led.

A proxy is a smooth loss beside what the study measures. A walk follows one of them by Adam, a few
steps of small batches in each trial, and the trial measures where the walk stands. Three rules:

* Each proxy is followed for a few trials first. Its weight from then on is the rank correlation
  between its own values and the measured losses along its walk, if that is positive.
* Walks that run side by side differ in their batches alone. The mean of where they end up is better
  than any of them (Polyak and Juditsky 1992, "Acceleration of stochastic approximation by
  averaging"), so it is measured too, and the next walk begins there, with batches twice as large.
* A walk ends when its measured losses stop falling by more than their error, and walks end when the
  mean of the ends does, or when their share of the budget is spent.

A gradient costs as much as three evaluations of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mergesearch.evaluators import Batch
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.parts.gradient_walks import GradientWalk, WalkStep
from mergesearch.search.strategies.parts.noise import squared_error
from mergesearch.search.strategies.parts.seeding import loss_of
from mergesearch.search.workers.gradient_steps import GRADIENT_COST, OptimizerConfig

#: Steps of a whole walk, and the trials that measure it.
STEPS = 180
TRIALS = 8
#: Trials of the first walk along each proxy, where there are several.
OPENING = 4
#: Share of the walks' budget that the gradients of the first whole walk cost.
FIRST = 0.5
#: Items of a batch, at least.
LEAST_ITEMS = 16
#: Walk so far, in widths of the box: steps times learning rate.
REACH = 3.0
RATES = (0.03, 0.15)
#: Trials that are averaged to see whether losses still fall.
WINDOW = 3
#: Losses that fall by less than so many standard errors have stopped falling.
FALL = 0.25


@dataclass(frozen=True)
class Pace:
    """How much work is in a walk.

    Attributes:
        steps: Gradient steps of each trial.
        items: Items of a batch of the first walks, over all domains.
        rate: Learning rate as a fraction of the box.
    """

    steps: int
    items: int
    rate: float


@dataclass(eq=False)
class _Course:
    """One walk and what was measured along it.

    Attributes:
        walk: Where it stands.
        proxy: Number of the proxy that it follows alone; -1 for a mixture.
        generation: Walks that it came after, one upon the other.
        left: Trials that it may still ask for.
        cost: Evaluations that a trial's gradients cost, in whole trials.
        waits: Whether a trial has no result yet.
        points: Where it was measured.
        losses: There, scalarised.
        proxies: Value of what it follows there, on the first batches of the trial.
    """

    walk: GradientWalk
    proxy: int
    generation: int
    left: int
    cost: float
    waits: bool = False
    points: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    proxies: list[float] = field(default_factory=list)

    def tail(self) -> tuple[float, Point] | None:
        """Mean loss and mean point of the last third of the trials; None before the first."""
        if not self.losses:
            return None
        count = max(len(self.losses) // 3, 1)
        return float(np.mean(self.losses[-count:])), np.mean(self.points[-count:], axis=0)


class ProxyWalks:
    """Walks along proxies until their share of the budget is spent, or until they lead no further.

    Args:
        problem: The box, and how losses combine.
        seed: Shuffles the items.
        proxies: What can be followed: loss -> weight, for each proxy.
        share: Part of the budget that walks may cost.
        rate: Learning rate as a fraction of the box; None: by the number of steps.
        items: Items of every domain in a batch; None: by the budget.

    Attributes:
        over: Whether no walk begins any more.
        spent: What has been asked so far, in evaluations of all items.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        proxies: Sequence[Mapping[str, float]],
        share: float,
        rate: float | None,
        items: int | None,
    ) -> None:
        self._problem = problem
        self._seed = seed
        self._proxies = proxies
        self._share = share
        self._limit = share * problem.budget
        self._pace = pace(problem, self._limit, rate)
        self._items = items
        self._courses: list[_Course] = []
        self.spent = 0.0
        self._generation = 0
        self._start = problem.start
        # Loss and place of the start and of the mean of ends, once measured.
        self._measured_start: tuple[float, Point] | None = None
        self._measured_end: tuple[float, Point] | None = None
        self._pending: Point | None = None
        self.over = False

    def propose(self) -> tuple[int, WalkStep | Point] | None:
        """Number of a walk and its next trial; -1 and a point to measure; None once they are over.

        Walks that wait for results are passed over.
        """
        if self._pending is not None:
            point = self._pending
            self._pending = None
            self.spent += 1.0
            return -1, point
        if self.over:
            return None
        ready = [n for n, course in enumerate(self._courses) if course.left and not course.waits]
        if not ready:
            self._courses.append(self._begin(len(self._courses)))
            ready = [len(self._courses) - 1]
        # The first trial is made whatever it costs.
        if self.spent and self.spent + 1.0 + self._courses[ready[0]].cost > self._limit:
            self.finish()
            return self.propose()
        return self._next(ready[0])

    def learn(self, number: int, step: WalkStep | Point, result: TrialResult) -> None:
        """Learn from the result of a proposal."""
        loss = loss_of(result, self._problem) if result.evaluated is None else np.inf
        if number < 0:
            self._measured_end = loss, result.point
            return
        assert isinstance(step, WalkStep)
        course = self._courses[number]
        course.waits = False
        course.walk.learn(step, result)
        walked = result.gradient_result
        if np.isfinite(loss):
            self._measured_start = self._measured_start or (loss, result.point)
            course.points.append(result.point)
            course.losses.append(loss)
            course.proxies.append(np.nan if walked is None else float(np.mean(walked.losses[:4])))
        if course.left and stalled(course.losses, self.error_of(result)):
            course.left = 0
        if not course.left:
            self._settle(course, self.error_of(result))

    def set_budget(self, budget: int) -> None:
        """Let walks cost their share of another budget; the pace stays."""
        self._limit = self._share * budget

    def finish(self) -> None:
        """Begin no walk any more, and measure where those so far have led."""
        if not self.over:
            self.over = True
            self._pending = self.mean_of_ends()

    def best(self) -> tuple[float, Point] | None:
        """Mean of the ends with its loss, or the start if that is better; None before any."""
        end = self._measured_end
        if end is None and (mean := self.mean_of_ends()) is not None:
            end = min(tail[0] for tail in self._tails()), mean
        known = [place for place in (end, self._measured_start) if place is not None]
        return min(known, key=lambda place: place[0], default=None)

    def mean_of_ends(self) -> Point | None:
        """Mean of the ends of the walks that are about as good as the best; None before any."""
        tails = self._tails()
        if not tails:
            return None
        low = min(loss for loss, _ in tails)
        first = max(course.losses[0] for course in self._courses if course.losses)
        spread = max(first - low, 0.0)
        near = [point for loss, point in tails if loss <= low + 0.1 * spread]
        # A mean of equal numbers differs from them by rounding.
        mean = np.clip(np.mean(near, axis=0), self._problem.lower, self._problem.upper)
        return np.asarray(mean)

    @property
    def path(self) -> list[Point]:
        """Every measured point of every walk."""
        return [point for course in self._courses for point in course.points]

    def error_of(self, result: TrialResult) -> float:
        """Standard error of a result's scalarised loss; 0 where it is not known."""
        square = squared_error(result, self._problem.scalarise)
        return 0.0 if math.isnan(square) else math.sqrt(square)

    def _tails(self) -> list[tuple[float, Point]]:
        """Mean loss and mean point of each walk's end."""
        return [tail for course in self._courses if (tail := course.tail()) is not None]

    def _next(self, number: int) -> tuple[int, WalkStep]:
        course = self._courses[number]
        step = course.walk.propose()
        assert step is not None
        course.left -= 1
        course.waits = True
        self.spent += 1.0 + course.cost
        follows = {f"follows {name}": w for name, w in course.walk.config.weights.items()}
        return number, replace(step, notes=follows)

    def _settle(self, course: _Course, error: float) -> None:
        """Let the next walk begin at the mean of the ends, or none where walks lead no further."""
        if self.over:
            return
        level, end = course.tail() or (np.inf, self._start)
        before = [
            tail[0]
            for other in self._courses
            if other.generation < course.generation and (tail := other.tail()) is not None
        ]
        if before and level > min(before) - FALL * error:
            self.finish()
        elif course.proxy >= 0:
            best = self.best()
            self._start = end if best is None else best[1]
        elif (centre := self.mean_of_ends()) is not None:
            self._start = centre
            self._generation = max(self._generation, course.generation + 1)

    def _begin(self, number: int) -> _Course:
        opening = len(self._proxies) > 1 and number < len(self._proxies)
        length = OPENING if opening else TRIALS
        batch = Batch(size=self._batch_size(), seed=self._seed + number)
        width = float(np.mean(self._problem.width))
        config = OptimizerConfig(
            self._problem.lower,
            self._problem.upper,
            self._problem.start,
            self._proxies[number] if opening else self.mixture(),
            learning_rate=self._pace.rate * max(width, 1e-12),
            period=length * self._pace.steps,
            batch=batch,
        )
        items = GRADIENT_COST * self._pace.steps * items_of(self._problem, batch)
        start = self._problem.start if opening else self._start
        walk = GradientWalk(config, start, self._pace.steps)
        cost = items / max(self._problem.items, 1)
        return _Course(walk, number if opening else -1, self._generation, length, cost)

    def mixture(self) -> dict[str, float]:
        """Loss -> weight of the mixture that walks follow now, by what each proxy predicts."""
        factors = np.zeros(len(self._proxies))
        for course in self._courses:
            if course.proxy >= 0:
                factors[course.proxy] = prediction(course.proxies, course.losses)
        if not np.any(factors > 0):
            factors[:] = 1.0
        mixed: dict[str, float] = {}
        for factor, proxy in zip(factors / factors.sum(), self._proxies, strict=True):
            for name, weight in proxy.items():
                if factor > 0:
                    mixed[name] = mixed.get(name, 0.0) + float(factor * weight)
        return mixed

    def _batch_size(self) -> int | None:
        """Items of every domain in a batch of a walk that begins now.

        Walks beside it share the budget, and the mean of their ends averages their noise.
        """
        if self._items is not None:
            size = self._items * 2**self._generation
        else:
            beside = 1 + sum(course.waits for course in self._courses)
            items = max(self._pace.items // beside, min(LEAST_ITEMS, self._pace.items))
            domains = max(items_of(self._problem, Batch(size=1)), 1)
            size = max(round(items * 2**self._generation / domains), 1)
        return size if size < max(self._problem.items, 1) else None


def pace(problem: Problem, budget: float, rate: float | None) -> Pace:
    """Steps, batches and learning rate of walks that may cost ``budget`` whole trials."""
    items = max(problem.items, 1)
    affordable = FIRST * budget * items / GRADIENT_COST  # items of all batches together
    batch = int(np.clip(affordable / STEPS, min(LEAST_ITEMS, items), items))
    steps = int(np.clip(round(affordable / batch), TRIALS, STEPS))
    low, high = RATES
    return Pace(
        max(round(steps / TRIALS), 1),
        batch,
        float(np.clip(REACH / steps, low, high)) if rate is None else rate,
    )


def items_of(problem: Problem, batch: Batch) -> int:
    """Items of a batch over all domains; where that is not known, as of a single domain."""
    if problem.batch_items is not None:
        return problem.batch_items(batch)
    items = max(problem.items, 1)
    return items if batch.size is None else min(batch.size, items)


def stalled(losses: Sequence[float], error: float) -> bool:
    """Whether the newest losses are not below those before by more than a part of their error."""
    if len(losses) < 2 * WINDOW:
        return False
    newest = float(np.mean(losses[-WINDOW:]))
    return newest > float(np.mean(losses[-2 * WINDOW : -WINDOW])) - FALL * error


def prediction(values: Sequence[float], losses: Sequence[float]) -> float:
    """How well a proxy's values rank the measured losses: Spearman's correlation, 0 at least."""
    known = np.isfinite(values)
    ours = np.asarray(values)[known]
    theirs = np.asarray(losses)[known]
    if len(ours) < WINDOW or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    from scipy.stats import spearmanr

    return max(float(spearmanr(ours, theirs).statistic), 0.0)
