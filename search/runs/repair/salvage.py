"""What a damaged journal becomes: lines that stand, and places for what is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mergesearch.evaluators import Objective
from mergesearch.search.grammar import counted
from mergesearch.search.record.attributes import ASKED, PREFIX, RESULT
from mergesearch.search.record.journal_lines import (
    CREATE_STUDY,
    CREATE_TRIAL,
    SET_STATE,
    SET_STUDY_ATTRIBUTE,
    SET_TRIAL,
    SYSTEM_ATTRIBUTE_OF_STUDY,
    SYSTEM_ATTRIBUTE_OF_TRIAL,
)
from mergesearch.search.runs.repair.facts import (
    REPEATS,
    VERDICT,
    choice_holds,
    fact_of,
    facts,
    fitting,
    forgotten,
)
from mergesearch.search.runs.repair.lines import Damage, Line
from mergesearch.search.runs.repair.places import lost_questions, told_places
from mergesearch.search.runs.repair.trials import (
    Trial,
    alike,
    gather,
    have_items,
    with_asked,
    within,
)

#: Who writes the lines that a repair adds.
WORKER = "repair"
#: Where the lines of an earlier repair are told.
REPAIRED = "repaired"
#: What is said of a lost trial that is not asked again under its number.
LOST = "its record was lost with a damaged line of the journal"


@dataclass(frozen=True)
class Salvage:
    """A journal as a repair writes it.

    Attributes:
        lines: Its operations.
        damages: The lines that are left out.
        kept: Number of trials that nothing is lost of.
        again: Trials whose results are lost, and that are measured again.
        asked: Trials of the search that are asked and measured again.
        gone: Anchors and recommendations whose records are lost; the study makes others.
        reopened: Whether the final choice is made again.
        notes: What the study does without attributes that are lost.
    """

    lines: tuple[Mapping[str, Any], ...]
    damages: tuple[Damage, ...]
    kept: int
    again: tuple[int, ...]
    asked: tuple[int, ...]
    gone: tuple[int, ...]
    reopened: bool
    notes: tuple[str, ...]

    @property
    def loses(self) -> bool:
        """Whether a result or the final choice is lost, so that the study has more to do."""
        return bool(self.again or self.asked or self.gone or self.reopened)

    @property
    def consequences(self) -> list[str]:
        """What is kept and what `mergesearch run` does about the rest, one line each."""
        told = [f"{counted(self.kept, 'trial')} kept"]
        todo = {
            "measured again, since their results are lost": self.again,
            "asked and measured again, since their records are lost": self.asked,
            "lost; the study measures the same merges under other numbers": self.gone,
        }
        told += [f"{_numbers(which)} {what}" for what, which in todo.items() if which]
        told += ["the final choice is made again"] if self.reopened else []
        return [*told, *self.notes]


def _numbers(which: Sequence[int]) -> str:
    shown = ", ".join(map(str, which[:12]))
    more = f" and {len(which) - 12} more" if len(which) > 12 else ""
    return f"{'trial' if len(which) == 1 else 'trials'} {shown}{more}:"


def salvage(found: Sequence[Line | Damage], name: str, objectives: Sequence[Objective]) -> Salvage:
    """What can be made of the lines of a journal.

    Args:
        found: As they stand in the file.
        name: Of the study.
        objectives: Of the study.
    """
    names = [objective.name for objective in objectives]
    found = fitting(alike(within(found)), names)
    damages = [each for each in found if isinstance(each, Damage)]
    lines = [each for each in found if isinstance(each, Line)]
    gathered = gather(found)
    trials = [
        gathered.get(number, Trial(number)) for number in range(max(gathered, default=-1) + 1)
    ]
    items = bool(damages) and have_items(trials)
    whole = {t.number for t in trials if t.whole(names, items=items)}
    places = told_places(trials, whole)
    questions = lost_questions(trials, whole, places)
    asked = tuple(number for number, question in questions.items() if question is not None)
    gone = tuple(number for number, question in questions.items() if question is None)
    again = tuple(t.number for t in trials if _is_lost(t, whole, places, damages) and t.created)
    known = facts(lines)
    held = choice_holds(known, trials, whole)
    created = {
        trial.number: _created(trial, questions.get(trial.number), places) for trial in trials
    }
    salvaged = _Writing(created, whole, gone, held).written(lines)
    return Salvage(
        lines=(*_study(lines, name, objectives), *salvaged),
        damages=tuple(damages),
        kept=len(whole),
        again=again,
        asked=asked,
        gone=gone,
        reopened=not held,
        notes=tuple(forgotten(damages, known)),
    )


def _is_lost(
    trial: Trial, whole: set[int], places: Mapping[int, int], damages: Sequence[Damage]
) -> bool:
    """Whether a trial had a result that is lost; one that was under way at the end had none."""
    if trial.number in whole:
        return False
    broken = bool(damages) and trial.trace is not None
    return trial.number in places or trial.finished is not None or broken


def _created(
    trial: Trial, question: Mapping[str, Any] | None, places: Mapping[int, int]
) -> list[Mapping[str, Any]]:
    """The lines that create a trial, with the place of a lost result; more for one that is lost."""
    more = {"told_at": places[trial.number]} if trial.number in places else {}
    if trial.created is not None:
        return [with_asked(trial.created.log, **more) if more else trial.created.log]
    if question is not None:
        return [_new_trial({**question, **more})]
    lost = {"kind": "taken", "name": "lost", "suggestion": None, "tells_at_ask": 0}
    new = _new_trial({"number": trial.number, **lost, "point": None, "field": None, "lost": True})
    failure = {"kind": "lost", "message": LOST, "detail": ""}
    result: dict[str, Any] = {"tell_index": None, "seconds": {}, "errors": {}, "failure": failure}
    result |= {"worker": "", "finished": datetime.now(UTC).timestamp()}
    told = {"op_code": SYSTEM_ATTRIBUTE_OF_TRIAL, "trial_id": trial.number}
    ended = {"op_code": SET_STATE, "trial_id": trial.number, "state": 3, "values": None}
    return [
        new,
        {**told, "worker_id": WORKER, "system_attr": {RESULT: json.dumps(result)}},
        {**ended, "worker_id": WORKER, "datetime_complete": _now()},
    ]


def _new_trial(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "op_code": CREATE_TRIAL,
        "worker_id": WORKER,
        "study_id": 0,
        "datetime_start": _now(),
        "state": 0,
        "user_attrs": {"kind": asked["kind"]},
        "system_attrs": {ASKED: json.dumps(asked)},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _study(
    lines: Sequence[Line], name: str, objectives: Sequence[Objective]
) -> Iterator[Mapping[str, Any]]:
    """The lines that create the study; made anew where they are lost."""
    directions = [2 if objective.direction == "maximize" else 1 for objective in objectives]
    created = [line for line in lines if line.code == CREATE_STUDY]
    if created and created[0].log["study_name"] == name:
        yield {**created[0].log, "directions": directions}
    else:
        head = {"op_code": CREATE_STUDY, "worker_id": WORKER}
        yield {**head, "study_name": name, "directions": directions}
    names = [objective.name for objective in objectives]
    yield study_line("study:metric_names", names)


def study_line(key: str, value: Any) -> dict[str, Any]:
    """The line that sets an attribute of the study."""
    head = {"op_code": SYSTEM_ATTRIBUTE_OF_STUDY, "worker_id": WORKER, "study_id": 0}
    return {**head, "system_attr": {key: value}}


def repaired_line(earlier: Sequence[str], text: str) -> dict[str, Any]:
    """The line that says that the journal was repaired."""
    return study_line(f"{PREFIX}{REPAIRED}", json.dumps([*earlier, text]))


class _Writing:
    """Puts lines in an order in which every trial is created before it is changed.

    Args:
        created: Trial -> the lines that create it.
        whole: Trials that nothing is lost of; changes of others are left out.
        gone: Trials that the study makes anew; their scores are left out.
        held: Whether the final choice stands.
    """

    def __init__(
        self,
        created: Mapping[int, Sequence[Mapping[str, Any]]],
        whole: set[int],
        gone: Sequence[int],
        held: bool,
    ) -> None:
        self._created = created
        self._whole = whole
        self._dropped = {f"score:{s}:{n}" for n in gone for s in ("validation", "test")}
        self._dropped |= set() if held else {VERDICT, REPEATS}
        self._next = 0
        self._finished: set[int] = set()

    def written(self, lines: Sequence[Line]) -> list[Mapping[str, Any]]:
        """The lines that are kept, and those that create trials."""
        kept = [log for line in lines for log in self._kept(line)]
        return [*kept, *self._up_to(len(self._created) - 1)]

    def _kept(self, line: Line) -> Iterator[Mapping[str, Any]]:
        if line.code in SET_STUDY_ATTRIBUTE:
            if fact_of(line) not in self._dropped and "study:metric_names" not in line.log.get(
                "system_attr", {}
            ):
                yield line.log
        elif line.code in SET_TRIAL and line.trial in self._created:
            yield from self._changed(line)
        elif line.code == CREATE_TRIAL:
            number = json.loads(line.log["system_attrs"][ASKED]).get("number")
            yield from self._up_to(self._next if number is None else min(number, self._last))

    @property
    def _last(self) -> int:
        return len(self._created) - 1

    def _changed(self, line: Line) -> Iterator[Mapping[str, Any]]:
        yield from self._up_to(line.trial)
        if line.trial in self._whole and line.trial not in self._finished:
            yield line.log
        if line.code == SET_STATE and line.log["state"]:
            self._finished.add(line.trial)

    def _up_to(self, number: int) -> Iterator[Mapping[str, Any]]:
        while self._next <= min(number, self._last):
            yield from self._created[self._next]
            self._next += 1
