"""Several strategies in one study: they take turns, and learn from each other's trials.

Gomes 2001, "Algorithm portfolios": where it is not known which algorithm suits a problem, running
several costs little more than the best of them, and far less than the worst. Turns are taken in
proportion to the members' shares (smooth weighted round robin), never by clocks or results, so that
replay is exact. A member is told its own trials as its own, and those of the others as trials that
it did not suggest; model-based members learn from all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Strategy, Suggestion, TrialResult
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

#: Without a list of members: an adaptive Gaussian, a model, and a population of moving particles.
DEFAULT_MEMBERS = ("cma_es", "quadratic", "pso")
DEFAULT_SEVERAL = ("map", "sms_emoa", "cma_parego")

Member = Annotated[
    str | dict[str, Any], Bound(description="a name, or {name: ..., option: ..., share: ...}")
]


class Portfolio:
    """Strategies that take turns and share one log.

    Args:
        problem: The box; every member searches all of it.
        seed: Each member's seed is drawn from it.
        members: Names, or mappings of ``name``, options, and ``share`` (relative number of turns,
            default 1). Default: CMA-ES, the quadratic surrogate and a particle swarm; for several
            objectives MAP, SMS-EMOA and scalarised CMA-ES.
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
        self._names = [name for name, _, _ in specs]
        self._shares = np.array([share / total for _, _, share in specs])
        self._members = [
            _build(
                name,
                options,
                replace(problem, budget=max(int(problem.budget * share), 1)),
                int(own),
            )
            for (name, options, _), share, own in zip(specs, self._shares, seeds, strict=True)
        ]
        self._credit = np.zeros(len(specs))
        self._book = SuggestionBook[tuple[int, int]]()  # tickets: member, its own id

    def ask(self, count: int) -> list[Suggestion]:
        """Suggestions of the members in turn; one with nothing left to try is skipped."""
        suggestions = (self._next() for _ in range(count))
        return [suggestion for suggestion in suggestions if suggestion is not None]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell every member every trial; its proposer as its own."""
        for trial in trials:
            owner, own_id = self._book.redeem(trial) or (None, None)
            for number, member in enumerate(self._members):
                member.tell([replace(trial, id=own_id if number == owner else None)])

    def best(self) -> list[Point]:
        """What the members recommend, in their order."""
        return [point for member in self._members for point in member.best()]

    def _next(self) -> Suggestion | None:
        self._credit += self._shares
        for number in np.argsort(-self._credit, kind="stable"):
            suggestions = self._members[number].ask(1)
            if suggestions:
                self._credit[number] -= 1.0
                asked = suggestions[0]
                return self._book.issue(asked.point, (int(number), asked.id), items=asked.items)
        return None


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
