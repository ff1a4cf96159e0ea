"""Where lost trials and lost results stood in the order of asks and tells.

The strategy was told every result before it was asked for the next points, so the order is part of
the record. Results that stand say their place; the places that are left over belong to the results
that are lost, in the order of their lines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergesearch.search.runs.repair.trials import Trial


def told_places(trials: Sequence[Trial], whole: Collection[int]) -> dict[int, int]:
    """Trial whose result is lost -> its place in the order of tells, of those that were told.

    Args:
        trials: All of them, by number.
        whole: Numbers of those that nothing is lost of.
    """
    known = {
        trial.result["tell_index"]
        for trial in trials
        if trial.number in whole and trial.result["tell_index"] is not None
    }
    asks = [trial.asked["tells_at_ask"] for trial in trials if trial.asked]
    count = max([max(known, default=-1) + 1, *asks])
    gaps = [place for place in range(min(count, 2 * len(trials))) if place not in known]
    waiting = [trial for trial in trials if trial.number not in whole and _may_be_told(trial)]
    waiting.sort(key=lambda trial: (math.inf if trial.trace is None else trial.trace, trial.number))
    said = {trial.number: trial.result.get("tell_index") for trial in waiting}
    places = {
        number: place
        for number, place in said.items()
        if place in gaps and list(said.values()).count(place) == 1
    }
    left = [place for place in gaps if place not in places.values()]
    others = [trial.number for trial in waiting if trial.number not in places]
    return places | dict(zip(others, left, strict=False))


def _may_be_told(trial: Trial) -> bool:
    """Whether the strategy may have been told its result."""
    if trial.result:
        return trial.result["tell_index"] is not None
    return trial.kind == "search" or trial.asked.get("retry_of") is not None


def lost_questions(
    trials: Sequence[Trial], whole: Collection[int], places: Mapping[int, int]
) -> dict[int, dict[str, Any] | None]:
    """Trial whose question is lost -> what can be said of it; None where it was not of the search.

    Suggestions count from 0, so that the numbers that are missing between two trials of the search
    belong to the lost ones between them.

    Args:
        trials: All of them, by number.
        whole: Numbers of those that nothing is lost of.
        places: Of lost results in the order of tells.
    """
    said: dict[int, dict[str, Any] | None] = {}
    lost: list[Trial] = []
    before = -1
    for trial in [*trials, None]:
        if trial is not None and trial.created is None:
            lost.append(trial)
            continue
        suggestion = None if trial is None else trial.asked.get("suggestion")
        if trial is not None and suggestion is None:
            continue
        # After the last known suggestion nothing says how many there were.
        of_search = [each for each in lost if _may_be_told(each)]
        missing = len(of_search) if suggestion is None else max(suggestion - before - 1, 0)
        said |= dict.fromkeys(each.number for each in lost)
        for each in of_search[:missing]:
            before += 1
            earlier = [question for question in said.values() if question is not None]
            least = earlier[-1]["tells_at_ask"] if earlier else 0
            said[each.number] = _question(each, before, least, trials, whole, places)
        lost = []
        before = before if suggestion is None else suggestion
    return said


def _question(
    lost: Trial,
    suggestion: int,
    least: int,
    trials: Sequence[Trial],
    whole: Collection[int],
    places: Mapping[int, int],
) -> dict[str, Any]:
    later = [t for t in trials[lost.number + 1 :] if t.created is not None]
    earlier = [t for t in trials[: lost.number] if t.asked.get("suggestion") is not None]
    least = max(least, earlier[-1].asked["tells_at_ask"] if earlier else 0)
    following = next((t for t in later if t.asked.get("suggestion") is not None), None)
    lines = [t.created.number for t in later[:1] if t.created is not None]
    lines += [line.number for line in lost.changes[:1]]
    lines += [] if lost.lost_at is None else [lost.lost_at]
    told = _told_before(min(lines, default=math.inf), trials, whole, places)
    if lost.number in places:
        told = min(told, places[lost.number])
    if following is not None:
        told = min(told, following.asked["tells_at_ask"])
    return {
        "number": lost.number,
        "kind": "search",
        "name": "",
        "suggestion": suggestion,
        "tells_at_ask": max(told, least),
        "point": None,
        "field": None,
        "lost": True,
    }


def _told_before(
    line: float, trials: Sequence[Trial], whole: Collection[int], places: Mapping[int, int]
) -> int:
    """How many results the strategy had been told at a line of the journal."""
    told = 0
    for trial in trials:
        place = trial.result["tell_index"] if trial.number in whole else places.get(trial.number)
        if place is not None and trial.trace is not None and trial.trace < line:
            told = max(told, place + 1)
    return told
