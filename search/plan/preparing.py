"""How long a study prepares weights before its first trial, on each device that it may use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mergesearch.merging.family.effort import MATRIX_WORK, preparation_seconds
from mergesearch.merging.family.rates import CARD_RATES, READ, Rates, measured_rates
from mergesearch.merging.operators import get_operator
from mergesearch.search.grammar import counted
from mergesearch.search.plan.cards import PlannedCard, cards_here
from mergesearch.search.plan.plan import Plan

#: Rates of one core of a server, about: they only decide whether measuring is worth its time.
CORE_RATES = Rates(READ, multiply=90e9, multiply_wide=40e9, few=8e9, every=4e9)
#: Seconds below which no rates are measured.
WORTH_MEASURING = 10.0


@dataclass(frozen=True)
class Preparing:
    """How long preparing is expected to take.

    Attributes:
        threads: Cores of this machine that would work.
        seconds: On those.
        measured: Whether at rates of this machine; else at those of any server's core.
        card: Name of the card that the study is planned for; empty where there is none.
        card_seconds: With decompositions on that card; None where its rates are not known.
        chosen: Where the study has decompositions run.
        partial: Whether runs of the experts on calibration items come on top.
    """

    threads: int
    seconds: float
    measured: bool
    card: str
    card_seconds: float | None
    chosen: str
    partial: bool

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON."""
        return asdict(self)


def preparing_of(
    plan: Plan,
    card: PlannedCard | None,
    measure: Callable[[], Rates] = measured_rates,
) -> Preparing | None:
    """How long a planned study prepares; None for problems without weights.

    Args:
        plan: The study.
        card: That it is planned for; by default one of this machine, if the study prepares there.
        measure: Gives the rates of one core; not called where preparing takes a
            few seconds, or only reads.
    """
    layout = plan.layout
    if layout is None:
        return None
    workers = plan.spec.workers
    operator = get_operator(plan.template.operator)
    threads = min(workers.threads, os.cpu_count() or 1)

    def seconds_at(rates: Rates) -> float:
        experts = len(plan.template.experts)
        options = plan.template.options
        return preparation_seconds(operator, layout, experts, rates, options, threads)

    if card is None and workers.prepare == "card" and workers.address is None:
        card = next(iter(cards_here()), None)
    rates = None if card is None else card_rates(card)
    about = seconds_at(CORE_RATES)
    measuring = about >= WORTH_MEASURING and operator.name in MATRIX_WORK
    return Preparing(
        threads=threads,
        seconds=seconds_at(measure()) if measuring else about,
        measured=measuring,
        card="" if card is None else card.name,
        card_seconds=None if rates is None else seconds_at(rates),
        chosen=workers.prepare,
        partial=bool(operator.needs or plan.template.options.get("calibration")),
    )


def card_rates(card: PlannedCard) -> Rates | None:
    """The rates of a known card, or of one that torch calls by the same model; else None."""
    if card.name in CARD_RATES:
        return CARD_RATES[card.name]
    words = re.findall(r"[a-z0-9]+", card.name.lower())
    named = (rates for key, rates in CARD_RATES.items() if key.partition("-")[0] in words)
    return next(named, None)


def preparing_line(preparing: Preparing) -> str:
    """The estimate for people."""
    cores = counted(preparing.threads, "core")
    parts = [f"{duration(preparing.seconds)} on {cores} of this machine"]
    if preparing.card_seconds is not None:
        hint = " (workers.prepare: card)" if preparing.card_seconds < preparing.seconds else ""
        parts.append(f"{duration(preparing.card_seconds)} on {preparing.card}{hint}")
    elif preparing.card:
        parts.append(f"no rates of {preparing.card} are known")
    if preparing.partial:
        parts.append("beside what the operator runs on its items")
    return f"preparing   {', '.join(parts)}"


def duration(seconds: float) -> str:
    """A duration in words, as exact as an estimate is: ``about 6 min``."""
    if seconds < WORTH_MEASURING:
        return f"less than {WORTH_MEASURING:.0f} s"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
