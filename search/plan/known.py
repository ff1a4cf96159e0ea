"""What is known of a study before it runs, as its report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.merging.family.untouched import Untouched, untouched
from mergesearch.merging.lineage.agreement import Agreement
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.lineage.verdict import judged
from mergesearch.merging.operators import get_operator
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.preparing import CORE_RATES, preparing_of


def passed_over(plan: Plan) -> Untouched | None:
    """What the study's operator passes over; None without weights."""
    if plan.layout is None:
        return None
    operator = get_operator(plan.template.operator)
    config = None if plan.family is None else plan.family.base.config
    return untouched(operator, plan.layout, plan.template.options, config)


def predicted_seconds(plan: Plan) -> Mapping[str, float]:
    """Phase -> seconds that it is expected to take, of those that a plan tells; JSON-able.

    Rates are those of any server's core: nothing is measured.
    """
    if plan.undecided:
        return {}
    preparing = preparing_of(plan, None, lambda: CORE_RATES)
    return {} if preparing is None else {"prepare": float(f"{preparing.seconds:.3g}")}


def lineage_rows(lineages: Sequence[Lineage]) -> list[dict[str, Any]]:
    """Expert, verdict, cosine and distance of every expert, JSON-able; None where unknown."""
    rows = []
    for lineage in lineages:
        by_role = judged(lineage.roles)
        whole = sum(by_role.values(), Agreement()) if by_role else None
        rows.append(
            {
                "expert": lineage.expert[0],
                "kind": lineage.kind,
                "cosine": None if whole is None else round(whole.cosine, 6),
                "distance": None if whole is None else round(whole.distance, 6),
                "finding": lineage.finding,
            }
        )
    return rows
