"""Seeded mutations of journals that keep every line one that Optuna may have written.

They change what lines say of trials and studies, and in which order: what two drivers, a merge of
two backups, or a text editor leave behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.mutations import Mutation, mutate_json, mutate_json_line
from tests.fuzz.values import nasty

Log = dict[str, Any]
#: What reading a line or a member raises where an earlier mutation has damaged it.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


def damage_attribute(data: bytes, draw: Random) -> bytes:
    """Change a value inside the JSON text of an attribute of one line."""

    def change(log: Log) -> None:
        attributes = log[draw.choice([key for key in log if key.startswith("system_attr")])]
        key = draw.choice(sorted(attributes))
        attributes[key] = mutate_json(attributes[key].encode(), draw).decode("latin-1")

    return _on_a_line(data, draw, change)


def forget_member(data: bytes, draw: Random) -> bytes:
    """Drop a member of an attribute in all lines, as an older version wrote them."""
    known = (
        "number",
        "retry_of",
        "same_as",
        "item_count",
        "gradient_items",
        "suggestion",
        "values",
    )
    gone = draw.choice(known)

    def change(logs: list[Log]) -> None:
        for log in logs:
            _forget(log, gone)

    return _on_logs(data, change)


def _forget(log: Log, member: str) -> None:
    attributes = log.get("system_attrs") or log.get("system_attr") or {}
    for key, text in attributes.items():
        if f'"{member}"' in str(text):
            held = json.loads(text)
            held.pop(member, None)
            attributes[key] = json.dumps(held)


def repeat_trial(data: bytes, draw: Random) -> bytes:
    """Write all lines of one trial again, here or at the end, under its number or another."""

    def change(logs: list[Log]) -> None:
        number = draw.choice([log["trial_id"] for log in logs if "trial_id" in log])
        created = [log for log in logs if log["op_code"] == 4]
        changed = [log for log in logs if log.get("trial_id") == number]
        again = [*created[number : number + 1], *changed] if draw.random() < 0.7 else changed
        if draw.random() < 0.4:
            new = {"trial_id": len(created)}
            again = [log | new if "trial_id" in log else log for log in again]
        at = draw.choice((len(logs), draw.randrange(len(logs) + 1)))
        logs[at:at] = again

    return _on_logs(data, change)


def renumber_trial(data: bytes, draw: Random) -> bytes:
    """Give some lines of a trial the number of another."""

    def change(logs: list[Log]) -> None:
        of_trials = [log for log in logs if "trial_id" in log]
        log = draw.choice(of_trials)
        log["trial_id"] = draw.choice([draw.choice(of_trials)["trial_id"], -1, 10**6, "0", True])

    return _on_logs(data, change)


def other_operation(data: bytes, draw: Random) -> bytes:
    """Give a line another operation, study, state, moment or writer."""

    def change(log: Log) -> None:
        values = {
            "op_code": draw.randrange(12),
            "study_id": draw.choice((1, -1, 10**20, nasty(draw))),
            "state": draw.choice((0, 1, 2, 3, 4, 7, nasty(draw))),
            "values": draw.choice((None, [], [0.5], [1.0, 2.0], [0.5] * 9, nasty(draw))),
            "worker_id": nasty(draw),
            "datetime_complete": draw.choice(("2026-13-01", "0001-01-01", nasty(draw))),
            "datetime_start": draw.choice(("9999-12-31T23:59:59.999999", nasty(draw))),
        }
        key = draw.choice([key for key in values if key in log])
        log[key] = values[key]

    return _on_a_line(data, draw, change)


def delete_study(data: bytes, draw: Random) -> bytes:
    """Delete the study, or create it or another one again, at any place."""

    def change(logs: list[Log]) -> None:
        name = draw.choice((logs[0].get("study_name"), "other", "", nasty(draw)))
        gone = {"op_code": 1, "worker_id": "w", "study_id": draw.choice((0, 0, 1))}
        new = {"op_code": 0, "worker_id": "w", "study_name": name, "directions": [1]}
        at = draw.randrange(len(logs) + 1)
        logs[at:at] = draw.choice(([gone], [new], [gone, new]))

    return _on_logs(data, change)


def mix_order(data: bytes, draw: Random) -> bytes:
    """Put the lines of a stretch into another order."""

    def change(logs: list[Log]) -> None:
        first = draw.randrange(len(logs))
        stretch = logs[first : first + draw.choice((4, 12, len(logs)))]
        draw.shuffle(stretch)
        logs[first : first + len(stretch)] = stretch

    return _on_logs(data, change)


def _on_logs(data: bytes, change: Callable[[list[Log]], None]) -> bytes:
    """The journal with its lines as a function leaves them; as it was where it cannot be read."""
    try:
        logs = [json.loads(line) for line in data.splitlines()]
        change(logs)
        return "".join(json.dumps(log) + "\n" for log in logs).encode()
    except _UNREADABLE:
        return data + b"\n"


def _on_a_line(data: bytes, draw: Random, change: Callable[[Log], None]) -> bytes:
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines)) if lines else 0
    try:
        log = json.loads(lines[at])
        change(log)
        lines[at] = json.dumps(log).encode() + b"\n"
    except _UNREADABLE:
        return mutate_json_line(data, draw)
    return b"".join(lines)


#: Mutations that keep a journal one that Optuna reads, and change what its attributes say.
ATTRIBUTES: dict[str, Mutation] = {"damage_attribute": damage_attribute}
#: Mutations of trials and studies in a journal.
TRIALS: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        forget_member,
        repeat_trial,
        renumber_trial,
        other_operation,
        delete_study,
        mix_order,
    )
}
