"""Attributes of the study in a damaged journal: which stand, and whether the final choice holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergesearch.search.record.attributes import PREFIX, study_value
from mergesearch.search.record.journal_lines import SET_STUDY_ATTRIBUTE
from mergesearch.search.runs.repair.lines import Damage, Line
from mergesearch.search.runs.repair.trials import Trial

VERDICT = "verdict"
#: Belongs to the winner, so that it goes with the final choice.
REPEATS = "repeats"
#: Attribute -> what a study does without it.
NEEDED = {
    "fingerprints": "the weights of base and experts are not compared with those of the record",
    "allowances": "changes of the budget are forgotten",
    "suggestions": "the number of expected suggestions is estimated anew",
    "operators": "the operators are chosen again",
    "start": "the other runs that the study starts from are read again",
    "strategy": "the strategy of `auto` is chosen as by the first version",
    "taken scores": "the other runs whose scores the study takes are read again",
    "code": "the code of plug-ins and operators is not compared with that of the record",
}


def fact_of(line: Line) -> str:
    """The attribute of ours that a line sets, without its prefix; empty for other lines."""
    if line.code not in SET_STUDY_ATTRIBUTE:
        return ""
    key = next(iter(line.log.get("system_attr", {"": None})))
    return str(key).removeprefix(PREFIX) if str(key).startswith(PREFIX) else ""


def facts(lines: Sequence[Line]) -> dict[str, Any]:
    """Attribute -> its last value."""
    found = {}
    for line in lines:
        key = fact_of(line)
        if key:
            found[key] = study_value(key, line.log["system_attr"][PREFIX + key], "journal")
    return found


def fitting(found: Sequence[Line | Damage], objectives: Collection[str]) -> list[Line | Damage]:
    """The lines, with those as damaged that set values of other objectives."""
    return [
        Damage(each.number, f"line {each.number}: expected a value for each objective", fact=key)
        if isinstance(each, Line) and (key := fact_of(each)) and _of_others(each, key, objectives)
        else each
        for each in found
    ]


def _of_others(line: Line, key: str, objectives: Collection[str]) -> bool:
    """Whether a line sets scores or repeats with other values than those of the objectives."""
    if not key.startswith(("score:", REPEATS)):
        return False
    value = facts([line])[key] or {}
    scores = value if key == REPEATS else [value.get("score")]
    valued = [each if key == REPEATS else each["values"] for each in scores if each is not None]
    return any(each.keys() != set(objectives) for each in valued)


def forgotten(damages: Sequence[Damage], known: Mapping[str, Any]) -> list[str]:
    """What the study does without the attributes that are lost, one line each."""
    lost = {damage.fact for damage in damages if damage.fact and damage.fact not in known}
    return [f"{key} is lost: {NEEDED[key]}" for key in sorted(lost & NEEDED.keys())]


def choice_holds(known: Mapping[str, Any], trials: Sequence[Trial], whole: Collection[int]) -> bool:
    """Whether the final choice stands with the trials and scores that it follows from."""
    verdict = known.get(VERDICT)
    if verdict is None:
        return True
    if len(whole) < len(trials):
        return False
    complete = {t.number for t in trials if t.result["failure"] is None and t.kind != "taken"}
    anchors = {t.number for t in trials if t.kind == "anchor"} & complete
    chosen = {verdict["winner"], *verdict["front"], *verdict["leaders"]}
    needed = [
        *(f"score:validation:{number}" for number in sorted(anchors | {*verdict["leaders"]})),
        *(f"score:test:{number}" for number in sorted(anchors | {verdict["winner"]})),
    ]
    return chosen <= {t.number for t in trials} and all(key in known for key in needed)
