"""Optimizers of nevergrad by name, behind the contract of strategies.

Rapin 2018, "Nevergrad: A gradient-free optimization platform", engine: nevergrad. What we add or
change:

* The start is suggested first, and populations are drawn around it instead of over the whole box.
  Results of others are told as points that were not asked for, where the optimizer can use them.
  Anchors are not: they lie far from each other and spoil the first step sizes (after 100 trials in
  8 dimensions, OnePlusOne had left 0.43 of the best anchor's excess loss with them and 0.09
  without, TBPSA 0.74 and 0.48, CMA 0.15 and 0.11; DE did not mind).
* nevergrad has no failures. They are told as worse than the worst result so far, and held back
  until there is one.
* Several objectives are combined by the problem's weights, scaled by the range of the anchors.
* Optimizers that fail with the pinned versions, or that can have one suggestion outstanding only,
  are refused (``FAULTS``). What an optimizer consists of decides, so that portfolios, chains and
  the choices of NGOpt are covered.
* NGOpt and its relatives choose an optimizer by dimension, budget and workers. For budgets below
  600 that is mostly a layer over CMA or (1+1) which now and then proposes the optimum of a
  quadratic model. That layer raises TypeError with numpy 2.4, so it is made to wait for more points
  than there will be: the same optimizers are chosen, and they alone propose. With two workers or
  more, NGOpt never chooses the sequential optimizers.

nevergrad draws from the random state of its parametrization, which we give it, but parts of it read
numpy's global generator. Every call therefore runs on a private state of that generator, and the
user's is put back.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: pycma's step-size rule changes at this dimension, to one that needs whole populations.
CMA_LIMIT = 299
#: Degree of a meta-model's polynomial. It waits for as many points as the polynomial needs: with
#: this one, for ever.
NEVER = 40
META_MODEL = "proposes the optimum of a meta-model, which raises TypeError with numpy 2.4"
ALTERNATIVES = "choose TBPSA, DE, TwoPointsDE, PSO or OnePlusOne, or the strategy cma_es"


@dataclass(frozen=True)
class Fault:
    """A reason why an optimizer cannot run here.

    Attributes:
        holds: Part of the optimizer, dimension -> whether it has this fault.
        reason: For the message: what is wrong, after the name of the part.
    """

    holds: Callable[[Any, int], bool]
    reason: str


def _is(part: Any, *names: str) -> bool:
    return type(part).__name__ in names


def _option(part: Any, name: str) -> bool:
    return bool(getattr(getattr(part, "_config", None), name, False))


#: Verified against the installed versions by ``tests/search/strategies/test_nevergrad.py``: an
#: entry that has been mended upstream fails there, and can be deleted.
FAULTS = {
    "sequential": Fault(
        lambda part, dim: bool(part.recast or part.no_parallelization),
        "waits for the result of its only suggestion before it can propose another",
    ),
    "fcmaes": Fault(
        lambda part, dim: _is(part, "_CMA") and (dim == 1 or _option(part, "fcmaes")),
        "needs the package fcmaes, which is not supported (every CMA of nevergrad does in one "
        "dimension)",
    ),
    "mean_shift": Fault(
        lambda part, dim: _is(part, "_CMA") and dim > CMA_LIMIT,
        f"works up to {CMA_LIMIT} dimensions: above, pycma wants every result of a population "
        "before the next",
    ),
    "high_speed": Fault(
        lambda part, dim: _option(part, "high_speed"),
        "recommends the optimum of a meta-model, which raises TypeError with numpy 2.4",
    ),
    "bayesian": Fault(
        lambda part, dim: _is(part, "_BO"),
        "refuses to be told the same point twice",
    ),
    "image_model": Fault(
        lambda part, dim: _is(part, "_MetaModel") and part.algorithm in ("image", "voxelize"),
        "proposes the optimum of a meta-model of images, which raises TypeError with numpy 2.4",
    ),
    "anisotropic_population": Fault(
        lambda part, dim: part.name in ("AnisoEMNATBPSA", "NaiveAnisoEMNATBPSA"),
        "raises ValueError when it adapts its population",
    ),
    "import_constants": Fault(
        lambda part, dim: part.name == "PolyLN",
        "has settings drawn at random whenever nevergrad is imported, so that no run can be "
        "repeated",
    ),
    "one_coordinate": Fault(
        lambda part, dim: dim == 1 and part.name in ("VoronoiDE", "RotatedRecombiningGA"),
        "raises ValueError in one dimension",
    ),
}


class Nevergrad:
    """A strategy that asks an optimizer of nevergrad.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generators.
        optimizer: A name of nevergrad's registry, such as NGOpt, CMA, DiagonalCMA, TBPSA, DE,
            TwoPointsDE, PSO or OnePlusOne.
        workers: Trials in flight that the optimizer should reckon with. It sets least populations
            and what NGOpt chooses; more or fewer may be in flight.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        optimizer: str = "NGOpt",
        workers: Annotated[int, Bound(ge=2)] = 2,
    ) -> None:
        self._problem = problem
        self._box = UnitBox(problem)
        states = np.random.SeedSequence(seed).spawn(2)
        self._random_state, self._global_state = (
            np.random.RandomState(np.random.MT19937(s)) for s in states
        )
        self._book = SuggestionBook[Any]()  # tickets: nevergrad's candidates
        # Candidates to be told as failed once there is a result to be worse than.
        self._failed: list[Any] = []
        self._best = np.inf
        self._worst = -np.inf
        self._engine: Any = None
        if self._box.dim:
            with self._isolated():
                self._engine = self._build(optimizer, workers)
                self._engine.suggest(self._box.to_unit(problem.start))

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` candidates, asked one by one."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell every whole result; failures as worse than the worst."""
        if self._engine is None:
            return
        for trial in trials:
            candidate = self._candidate_of(trial)
            if trial.losses is None:
                self._failed.append(candidate)
            elif trial.evaluated is None:
                self._tell(candidate, self._problem.scalarise(trial.losses))
            self._tell_failures()

    def best(self) -> list[Point]:
        """What the optimizer recommends."""
        if self._engine is None:
            return []
        with self._isolated():
            return [self._box.to_point(self._engine.provide_recommendation().value)]

    def _build(self, name: str, workers: int) -> Any:
        """The optimizer around the start of the unit box.

        Raises:
            InputError: If there is none of that name, or it has a fault.
        """
        import nevergrad as ng

        registry = ng.optimizers.registry
        if name not in registry:
            close = difflib.get_close_matches(name, registry, n=5, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; {ALTERNATIVES}"
            raise InputError(
                f"strategy.optimizer: expected an optimizer of nevergrad, received {name!r}{hint}"
            )
        if "MetaModel" in name:
            raise _refusal(name, name, META_MODEL)
        try:
            # With one worker, sequential parts can be built, and are seen; what NGOpt would choose
            # is not built yet.
            probe = registry[name](
                self._parametrization(np.random.RandomState(0)), self._problem.budget, 1
            )
            self._check(name, parts_of(probe))
            engine = registry[name](
                self._parametrization(self._random_state), self._problem.budget, workers
            )
        except (ImportError, AssertionError, ValueError) as error:
            raise _refusal(
                name, name, f"cannot be built ({' '.join(str(error).split())})"
            ) from None
        self._mend(name, engine)
        return engine

    def _mend(self, name: str, engine: Any) -> None:
        """Refuse what competence maps chose and cannot run; keep meta-models from proposing."""
        parts = list(parts_of(engine, chosen=True))
        self._check(name, parts)
        for part in parts:
            if _is(part, "_MetaModel"):
                part.degree = NEVER

    def _parametrization(self, random_state: np.random.RandomState) -> Any:
        import nevergrad as ng

        start = self._box.to_unit(self._problem.start)
        # With a start, samples are normal around it, a sixth of the range wide, and not uniform
        # over the box.
        array = ng.p.Array(init=start, lower=0.0, upper=1.0)
        array.random_state = random_state
        return array

    def _check(self, name: str, parts: Iterator[Any] | list[Any]) -> None:
        for part in parts:
            for fault in FAULTS.values():
                if fault.holds(part, self._box.dim):
                    raise _refusal(name, part.name, fault.reason)

    def _suggest(self) -> Suggestion:
        if self._engine is None:
            return self._book.issue(self._problem.start.copy())
        with self._isolated():
            candidate = self._engine.ask()
        # A step size that has overflowed makes a NaN; the start stands in, and is told as a point
        # of its own.
        unit = np.where(
            np.isfinite(candidate.value), candidate.value, self._box.to_unit(self._problem.start)
        )
        return self._book.issue(self._box.to_point(unit), candidate)

    def _candidate_of(self, trial: TrialResult) -> Any:
        """The candidate behind a result; a point that was not asked here becomes a new one."""
        candidate = self._book.redeem(trial)
        if candidate is not None and np.allclose(
            self._box.to_point(candidate.value), trial.point, rtol=0, atol=1e-9
        ):
            return candidate
        with self._isolated():
            return self._engine.parametrization.spawn_child(
                new_value=self._box.to_unit(trial.point)
            )

    def _tell_failures(self) -> None:
        """Tell failures as worse than the worst result.

        Optimizers mostly rank; the size of the margin decides little.
        """
        if np.isfinite(self._worst):
            margin = (self._worst - self._best) or 1.0
            failed = self._failed
            self._failed = []
            for candidate in failed:
                self._tell(candidate, self._worst + margin, failed=True)

    def _tell(self, candidate: Any, loss: float, *, failed: bool = False) -> None:
        from nevergrad.common.errors import TellNotAskedNotSupportedError

        if not failed:
            self._best = min(self._best, loss)
            self._worst = max(self._worst, loss)
        # Some optimizers take asked points only; nevergrad still counts the others among its
        # recommendations.
        with self._isolated(), contextlib.suppress(TellNotAskedNotSupportedError):
            self._engine.tell(candidate, loss)

    @contextlib.contextmanager
    def _isolated(self) -> Iterator[None]:
        """Give nevergrad a private numpy state, and keep its warnings from the user.

        Parts of it read numpy's global generator, whose state is put back afterwards.
        """
        users = np.random.get_state()  # noqa: NPY002  # nevergrad reads the legacy global generator
        np.random.set_state(self._global_state.get_state())  # noqa: NPY002
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            self._global_state.set_state(np.random.get_state())  # noqa: NPY002
            np.random.set_state(users)  # noqa: NPY002


def parts_of(optimizer: Any, *, chosen: bool = False) -> Iterator[Any]:
    """An optimizer and those that it consists of.

    With ``chosen``, also what competence maps such as NGOpt choose.
    """
    from nevergrad.optimization.base import Optimizer

    yield optimizer
    if chosen and hasattr(type(optimizer), "optim"):
        optimizer.optim  # noqa: B018  # a property: chosen at the first use
    for value in list(vars(optimizer).values()):
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Optimizer):
                yield from parts_of(part, chosen=chosen)


def _refusal(name: str, part: str, reason: str) -> InputError:
    what = "it" if part == name else f"it contains {part}, which"
    return InputError(
        "strategy.optimizer: expected an optimizer that works with suggestions in flight, "
        f"received {name!r}: "
        f"{what} {reason}; {ALTERNATIVES}"
    )
