"""What stands of each trial in a damaged journal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergesearch.search.record.array_text import decode_array
from mergesearch.search.record.attributes import ASKED, ITEMS, RESULT, asked_of, result_of
from mergesearch.search.record.journal_lines import SET_STATE, SET_TRIAL
from mergesearch.search.runs.repair.lines import Damage, Line, creates_trial

#: States of Optuna's trials that are final: complete, pruned, failed.
FINAL = (1, 2, 3)


@dataclass
class Trial:
    """What stands of a trial.

    Attributes:
        number: Its number.
        created: The line that created it, or None where that is lost.
        changes: The lines after that, until its state is final.
        broken: The first damaged line that belonged to it, or None.
        finished: The line of its final state, or None.
        lost_at: The damaged line that created it, as far as that is known.
    """

    number: int
    created: Line | None = None
    changes: list[Line] = field(default_factory=list)
    broken: int | None = None
    finished: Line | None = None
    lost_at: int | None = None

    @cached_property
    def asked(self) -> Mapping[str, Any]:
        """What was recorded when it was asked; empty where that is lost."""
        return {} if self.created is None else _asked(self.created)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """What was recorded of its result."""
        return {
            key: value
            for line in self.changes
            for key, value in line.log.get("system_attr", {}).items()
        }

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """What was recorded when it was told; empty where that is lost."""
        if RESULT not in self.attributes:
            return {}
        found: Mapping[str, Any] = result_of(self.attributes, f"trial {self.number}")
        return found

    @property
    def trace(self) -> int | None:
        """The line at which it was told, as far as that is known."""
        if self.finished is not None:
            return self.finished.number
        if self.broken is not None:
            return self.broken
        return self.changes[-1].number if self.changes else None

    @property
    def kind(self) -> str:
        """Who proposed it; ``search`` where that is lost."""
        return str(self.asked.get("kind", "search"))

    def whole(self, objectives: Collection[str], *, items: bool) -> bool:
        """Whether nothing of it is lost.

        Args:
            objectives: Names of the values that a complete trial has.
            items: Whether trials with a measurement have scores of items.
        """
        if self.created is None or self.finished is None or not self.result or self._broken:
            return False
        if self.result["failure"] is not None:
            return True
        values = self.finished.log["values"]
        named = self.result.get("values")
        if self.asked.get("item_count") == 0 and named == {}:
            return True  # it took gradient steps only
        if named is not None:
            valued = named.keys() == set(objectives)
        else:
            valued = values is not None and len(values) == len(objectives)
        return valued and (ITEMS in self.attributes or not items)

    @property
    def _broken(self) -> bool:
        """Whether a line of its result is damaged; what comes after the end belongs to others."""
        ended = self.finished
        return self.broken is not None and (ended is None or self.broken < ended.number)


def gather(found: Sequence[Line | Damage]) -> dict[int, Trial]:
    """Trials by number, from the lines of a journal in order."""
    gathering = _Gathering(limit=len(found))
    for each in found:
        gathering.add(each)
    last = max(gathering.trials, default=-1)
    for number, line in gathering.lost_at.items():
        if number <= last:
            gathering.trials.setdefault(number, Trial(number)).lost_at = line
    return gathering.trials


def within(found: Sequence[Line | Damage]) -> list[Line | Damage]:
    """The lines, with those as damaged that name a trial that cannot have been there.

    Every trial is created by a line, so that there are no more than these and the damaged lines.
    """
    created = [each for each in found if isinstance(each, Line) and creates_trial(each)]
    numbers = [_asked(line).get("number", 0) for line in created]
    said = max([len(created) - 1, *(number for number in numbers if number < len(found))])
    last = said + 1 + sum(isinstance(each, Damage) for each in found)
    return [
        Damage(each.number, f"line {each.number}: expected a trial up to {last}, received another")
        if isinstance(each, Line) and _names_more(each, last)
        else each
        for each in found
    ]


def alike(found: Sequence[Line | Damage]) -> list[Line | Damage]:
    """The lines, with those as damaged whose merge is of another size than most are."""
    sizes = {
        index: _sizes(each)
        for index, each in enumerate(found)
        if isinstance(each, Line) and creates_trial(each)
    }
    usual = [
        Counter(size for size in column if size is not None).most_common(1)
        for column in zip(*sizes.values(), strict=True)
    ]
    wrong = {
        index
        for index, own in sizes.items()
        if any(
            s is not None and s != most[0][0] for s, most in zip(own, usual, strict=True) if most
        )
    }
    return [
        Damage(each.number, f"line {each.number}: expected a merge of this study", creates=True)
        if index in wrong
        else each
        for index, each in enumerate(found)
    ]


def _sizes(line: Line) -> tuple[int | None, int | None]:
    """Dimensions of the point and size of the field that a line records; None where it has none."""
    asked = _asked(line)
    point = asked["point"]
    field_ = asked["field"]
    return (
        None if point is None else decode_array(point).size,
        None if field_ is None else field_["boundaries"][-1],
    )


def _names_more(line: Line, last: int) -> bool:
    """Whether a line names a trial after the last one."""
    if creates_trial(line):
        return bool(_asked(line).get("number", 0) > last)
    return line.code in SET_TRIAL and line.trial > last


class _Gathering:
    """Gives every line to its trial, and damaged lines to the trial whose lines they stand in.

    Args:
        limit: No trial has a number above this one.
    """

    def __init__(self, limit: int) -> None:
        self.trials: dict[int, Trial] = {}
        self.lost_at: dict[int, int] = {}  # trial -> the damaged line that created it
        self._limit = limit
        self._next = 0  # number of the next trial, where the record does not say it
        self._open: int | None = None  # the trial whose result is being read
        self._seen: set[str] = set()  # lines that create trials
        self._floating: list[int] = []  # damaged lines that wait for their trial

    def add(self, each: Line | Damage) -> None:
        """Take the next line."""
        if isinstance(each, Damage):
            if not each.repeated:
                self._add_damage(each)
        elif creates_trial(each):
            self._add_created(each)
        elif each.code in SET_TRIAL and each.trial <= self._limit:
            self._add_change(each)

    def _trial(self, number: int) -> Trial:
        return self.trials.setdefault(number, Trial(number))

    def _add_damage(self, damage: Damage) -> None:
        if damage.creates:
            self.lost_at[self._next] = damage.number
            self._next += 1
        elif damage.trial is not None and damage.trial <= self._limit:
            self._break(damage.trial, damage.number)
        elif self._open is not None:
            self._break(self._open, damage.number)
        else:
            self._floating.append(damage.number)

    def _break(self, number: int, line: int) -> None:
        trial = self._trial(number)
        if trial.broken is None:
            trial.broken = line

    def _add_created(self, line: Line) -> None:
        """Take the line that creates a trial, unless it stands twice."""
        number = _asked(line).get("number", self._next)
        if len(self._floating) == number - self._next:
            # As many lines that say nothing as trials that no line creates.
            self.lost_at |= dict(zip(range(self._next, number), self._floating, strict=True))
        known = self.trials.get(number)
        self._floating.clear()
        if number > self._limit or (known is not None and known.created is not None):
            return
        text = json.dumps(line.log)
        if text in self._seen:
            return
        self._seen.add(text)
        self._trial(number).created = line
        self._next = number + 1

    def _add_change(self, line: Line) -> None:
        trial = self._trial(line.trial)
        if self._floating and trial.finished is None:
            self._break(line.trial, self._floating[0])
        self._floating.clear()
        if trial.finished is not None:
            return
        self._next = max(self._next, line.trial + 1)
        trial.changes.append(line)
        self._open = line.trial
        if line.code == SET_STATE and line.log["state"] in FINAL:
            trial.finished = line
            self._open = None


def have_items(trials: Iterable[Trial]) -> bool:
    """Whether any trial has scores of items."""
    return any(ITEMS in trial.attributes for trial in trials)


def _asked(line: Line) -> Mapping[str, Any]:
    found: Mapping[str, Any] = asked_of(line.log["system_attrs"], f"line {line.number}")
    return found


def with_asked(log: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The line that creates a trial, with more in what is recorded of its question."""
    attributes = log["system_attrs"]
    asked = json.loads(attributes[ASKED]) | more
    return {**log, "system_attrs": {**attributes, ASKED: json.dumps(asked)}}
