"""Several strategies in one study: they take turns, and learn from each other's trials.

Gomes 2001, "Algorithm portfolios": where it is not known which algorithm suits a problem, running
several costs little more than the best of them, and far less than the worst. A member is told its
own trials as its own, and those of the others as trials that it did not suggest; model-based
members learn from all.

* Turns are taken in proportion to weights (smooth weighted round robin). These are the members'
  shares at first; later a member has more the more of its latest trials are among the leading ones
  of all. Results decide, never clocks, so that replay is exact.
* A point that was measured on the same items already is answered from the record and costs no
  trial, unless gradients are to be taken there.
* Members may follow gradients, where the evaluators provide them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.front import front_ranks
from mergesearch.search.strategies.base import (
    Point,
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.strategies.parts.seeding import key_of
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

Array = npt.NDArray[np.float64]

#: Without a list of members: an adaptive Gaussian, a model, and a population of moving particles.
DEFAULT_MEMBERS = ("cma_es", "quadratic", "pso")
DEFAULT_SEVERAL = ("map", "sms_emoa", "cma_parego")

#: Results of a member before its weight is more than its share, and the share of all results that
#: are leading ones.
LEAST = 15
LEADING = 0.1
#: Weight of a member without any leading trial, as a part of its share.
FLOOR = 0.1
#: Repeated points of a member that are answered in one turn; then one is measured again.
REPEATS = 20

Member = Annotated[
    str | dict[str, Any], Bound(description="a name, or {name: ..., option: ..., share: ...}")
]


class Portfolio:
    """Strategies that take turns and share one log.

    Args:
        problem: The box; every member searches all of it.
        seed: Each member's seed is drawn from it.
        members: Names, or mappings of ``name``, options, and ``share`` (relative number of turns
            until results decide, default 1). Default: CMA-ES, the quadratic surrogate and a
            particle swarm; for several objectives MAP, SMS-EMOA and scalarised CMA-ES.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        members: Annotated[list[Member], Bound(min_length=1)] | None = None,
    ) -> None:
        chosen = members or _defaults(problem)
        specs = [_parsed(member) for member in chosen]
        seeds = np.random.SeedSequence(seed).generate_state(len(specs))
        total = sum(share for _, _, share in specs)
        self._problem = problem
        self._shares = np.array([share / total for _, _, share in specs])
        self._members = [
            _build(
                name,
                options,
                replace(problem, budget=_part(problem.budget, share)),
                int(own),
            )
            for (name, options, _), share, own in zip(specs, self._shares, seeds, strict=True)
        ]
        self._credit = np.zeros(len(specs))
        self._weights = self._shares
        self._book = SuggestionBook[tuple[int, int]]()  # tickets: member, its own id
        self._results: list[tuple[int, Array]] = []  # member and losses of every whole trial
        self._measured: dict[tuple[bytes, int | None], TrialResult] = {}
        for anchor in problem.anchors:
            self._remember(anchor)

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        """What the members need of the evaluators."""
        from mergesearch.search.strategies.table import get_strategy_info

        names = [_parsed(member)[0] for member in options.get("members") or ()]
        return cls.needs.union(*(get_strategy_info(name).load().needs for name in names))

    def ask(self, count: int) -> list[Suggestion]:
        """Suggestions of the members in turn; one with nothing left to try is skipped."""
        suggestions = (self._next() for _ in range(count))
        return [suggestion for suggestion in suggestions if suggestion is not None]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell every member every trial; its proposer as its own."""
        for trial in trials:
            owner, own_id = self._book.redeem(trial) or (None, None)
            self._remember(trial)
            if owner is not None and trial.evaluated is None:
                worst = np.full(self._problem.objectives, np.inf)
                self._results.append((owner, worst if trial.losses is None else trial.losses))
                self._weights = self._weigh()
            for number, member in enumerate(self._members):
                member.tell([replace(trial, id=own_id if number == owner else None)])

    def best(self) -> list[Point]:
        """What the members recommend, that of the member with the largest weight first."""
        order = np.argsort(-self._weights, kind="stable")
        return [point for number in order for point in self._members[number].best()]

    def set_budget(self, budget: int) -> None:
        """Every member gets its first share of another budget."""
        for member, share in zip(self._members, self._shares, strict=True):
            tell_budget(member, _part(budget, share))

    def _next(self) -> Suggestion | None:
        credit = self._credit + self._weights
        repeated: Suggestion | None = None
        for number in map(int, np.argsort(-credit, kind="stable")):
            asked, answered = self._new_suggestion(number)
            repeated = answered or repeated
            if asked is not None:
                credit[number] -= 1.0
                self._credit = credit
                return self._book.relay(asked, (number, asked.id))
        # What was answered has changed a member: the record must show that something was asked.
        return None if repeated is None else self._book.relay(repeated)

    def _new_suggestion(self, number: int) -> tuple[Suggestion | None, Suggestion | None]:
        """A member's next suggestion that is not known yet, and its last one that was."""
        member = self._members[number]
        answered: Suggestion | None = None
        for _ in range(REPEATS):
            suggestions = member.ask(1)
            if not suggestions:
                return None, answered
            known = self._measured.get(_place(suggestions[0].point, suggestions[0].items))
            if known is None or suggestions[0].gradient_steps is not None:
                return suggestions[0], answered
            answered = suggestions[0]
            member.tell([replace(known, id=answered.id)])
        return next(iter(member.ask(1)), None), answered

    def _remember(self, trial: TrialResult) -> None:
        """Keep a result for members that ask for the same point; failures may not recur."""
        if trial.losses is not None and trial.estimated is None:
            self._measured[_place(trial.point, trial.evaluated)] = replace(
                trial, gradient_result=None
            )

    def _weigh(self) -> Array:
        """Weights of the members ``(members,)``, which sum to 1."""
        owners = np.array([owner for owner, _ in self._results])
        leads = leading(np.array([losses for _, losses in self._results]), self._problem)
        yields = np.full(len(self._members), np.nan)
        for number in range(len(self._members)):
            own = leads[owners == number]
            if own.size >= LEAST:
                yields[number] = np.mean(own[-max(own.size // 2, LEAST) :])
        if not np.any(yields > 0):
            return self._shares
        # A member with few results may be as good as the best.
        relative = np.where(np.isnan(yields), 1.0, yields / np.nanmax(yields))
        weights = self._shares * np.maximum(relative, FLOOR)
        return np.asarray(weights / weights.sum())


def leading(losses: Array, problem: Problem) -> npt.NDArray[np.bool_]:
    """Which trials ``(trials, objectives)`` are among the best :data:`LEADING` of all.

    With several objectives, whole fronts lead until there are enough.
    """
    wanted = math.ceil(LEADING * len(losses))
    ranks = losses[:, 0] if problem.objectives == 1 else front_ranks(losses)
    return np.asarray(np.isfinite(ranks) & (ranks <= np.sort(ranks)[wanted - 1]))


def _part(budget: int, share: float) -> int:
    """A member's part of a budget."""
    return max(int(budget * share), 1)


def _place(point: Point, items: int | None) -> tuple[bytes, int | None]:
    """A point and the items that it is measured on."""
    return key_of(point), items


def _defaults(problem: Problem) -> list[str]:
    from mergesearch.search.strategies.table import STRATEGIES

    names = DEFAULT_MEMBERS if problem.objectives == 1 else DEFAULT_SEVERAL
    fitting = [name for name in names if problem.dim <= (STRATEGIES[name].most or problem.dim)]
    return list(fitting)


def _parsed(member: str | Mapping[str, Any]) -> tuple[str, dict[str, Any], float]:
    """Name, options and share of a member.

    Raises:
        InputError: If it has no name, an unknown one, or a share that is not positive.
    """
    from mergesearch.search.strategies.table import check_options, get_strategy_info

    options = {"name": member} if isinstance(member, str) else dict(member)
    name = options.pop("name", None)
    share = options.pop("share", 1.0)
    if not isinstance(name, str) or name in ("portfolio", "auto"):
        raise InputError(
            "strategy.members: expected the name of a strategy that searches by itself, received "
            f"{member!r}"
        )
    if (
        isinstance(share, bool)
        or not isinstance(share, int | float)
        or not 0 < share < float("inf")
    ):
        raise InputError(f"strategy.members: {name}: expected a positive share, received {share!r}")
    if get_strategy_info(name).space != "coefficients":
        raise InputError(
            f"strategy.members: {name} searches a space of its own and cannot share a log; give it "
            "its own study"
        )
    return name, check_options(name, options), float(share)


def _build(name: str, options: Mapping[str, Any], problem: Problem, seed: int) -> Strategy:
    from mergesearch.search.strategies.table import build_strategy

    return build_strategy(name, options, problem, seed)
