"""The best trials of a study for a dashboard: those that the search found and that keep all bounds.

Trials that miss a bound are not among the best, nor are anchors. Anchors are no infeasible trials
in the record, which would keep them out too: every plot would call them so, and whoever reads the
study with Optuna would rank without what the search must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.search.front import nondominated


@dataclass(frozen=True, slots=True)
class Candidate:
    """What decides whether a trial is among the best.

    Attributes:
        place: Its place in the study.
        values: One for each objective; None where it is not complete.
        anchor: Whether it is a known merge.
        feasible: Whether it keeps all bounds.
    """

    place: int
    values: Sequence[float] | None
    anchor: bool
    feasible: bool


def best_of(candidates: Sequence[Candidate], directions: Sequence[str]) -> list[int]:
    """Places of the best trials, in order.

    Anchors are known beforehand, so that they are among the best only while no other trial is
    there.

    Args:
        candidates: All trials of a study.
        directions: ``maximize`` or ``minimize`` for each objective.
    """
    done = [each for each in candidates if each.values is not None and each.feasible]
    found = [each for each in done if not each.anchor] or done
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in directions]
    losses = [
        [sign * value for sign, value in zip(signs, each.values or (), strict=True)]
        for each in found
    ]
    if len(signs) == 1:
        return [found[losses.index(min(losses))].place] if found else []
    kept = nondominated(losses) if found else ()
    return [each.place for each, on_front in zip(found, kept, strict=True) if on_front]


def best_trials(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best trials of a study as the API describes it, with all its trials.

    The API's own list knows of neither bounds nor anchors; it is kept for studies without them, and
    for preferential ones.
    """
    trials = detail["trials"]
    candidates = [_candidate(place, trial) for place, trial in enumerate(trials)]
    plain = all(each.feasible and not each.anchor for each in candidates)
    if detail.get("is_preferential") or plain:
        return list(detail["best_trials"])
    return [trials[place] for place in best_of(candidates, detail["directions"])]


def _candidate(place: int, trial: Mapping[str, Any]) -> Candidate:
    complete = trial["state"] == "Complete"
    return Candidate(
        place,
        # Infinities are words in JSON, which `float` reads.
        [float(value) for value in trial["values"]] if complete else None,
        # As its attributes for people say.
        anchor={"key": "kind", "value": "anchor"} in trial["user_attrs"],
        feasible=all(missed <= 0 for missed in trial["constraints"]),
    )
