"""What the dashboard's API says of a study, with each of its trials written once.

The dashboard compares and writes all trials of a study anew for each answer, which takes seconds
for thousands of them. Here it is shown one trial of each kind, and those that are not plain. What
it says of the study then holds for all of them, and what it writes of these is the proof that the
others are written as it would write them: where anything differs, it has to do all of it itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.search.dashboard.answers import Answer, finite_json
from mergesearch.search.dashboard.best_trials import Candidate, best_of
from mergesearch.search.dashboard.shown_storage import FewTrials
from mergesearch.search.dashboard.trial_json import Trial, kind_of, plain_json
from mergesearch.search.record.trial_text import CONSTRAINTS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from mergesearch.search.record.storage import Storage

#: Notes and files of trials are attributes of the study, whose keys name the trial.
NAMES_A_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")
#: Below so many trials nobody minds that the dashboard is shown nearly all of them, and then all.
FEW = 100


@dataclass(frozen=True)
class Detail:
    """The answer to a request for a study.

    Attributes:
        answer: What the dashboard answers, without trials.
        trials: The trials as JSON, by number.
    """

    answer: Answer
    trials: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Written:
    """A plain trial as JSON, and what is special about it."""

    text: bytes
    kind: tuple[Any, ...]


class StudyDetails:
    """Answers to requests for studies, whose ended trials are written once.

    Args:
        storage: Where the studies are.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._written: dict[int, dict[int, _Written]] = {}  # study -> id -> ended trial

    def of(self, study_id: int, environ: WSGIEnvironment) -> Detail | None:
        """The answer to a request for a study; None where the dashboard has to make it."""
        try:
            return self._made(study_id, environ)
        except Exception:  # the dashboard has an answer to whatever is wrong with a storage
            return None

    def _made(self, study_id: int, environ: WSGIEnvironment) -> Detail | None:
        import optuna_dashboard

        known = (each for each in self._storage.get_all_studies() if each._study_id == study_id)
        study = next(known, None)
        if study is None:
            return None
        trials = self._storage.get_all_trials(study_id, deepcopy=False)
        written = self._plain(study, trials)
        few = _few(trials, written)
        if len(few) > max(FEW, len(trials) // 2):
            return None
        answer = Answer.of(optuna_dashboard.wsgi(FewTrials(study, few)), environ)
        if not answer.status.startswith("200"):
            return None
        return _whole(answer, trials, written, {trial.number for trial in few})

    def _plain(self, study: Any, trials: Sequence[Trial]) -> dict[int, _Written]:
        """Number -> JSON of the plain trials."""
        ended = self._written.setdefault(study._study_id, {})
        named = {int(match[1]) for match in map(NAMES_A_TRIAL.match, study.system_attrs) if match}
        found = {}
        for trial in trials:
            trial_id = trial._trial_id
            known = ended.get(trial_id)
            if known is None and (text := plain_json(study._study_id, trial)) is not None:
                known = _Written(text, kind_of(trial))
                if trial.state.is_finished():
                    ended[trial_id] = known
            if known is not None and trial_id not in named:
                found[trial.number] = known
        return found


def _few(trials: Iterable[Trial], written: Mapping[int, _Written]) -> list[Trial]:
    """The trials that are not plain, and the last one of each kind of plain ones."""
    last = {each.kind: number for number, each in written.items()}
    shown = set(last.values())
    return [trial for trial in trials if trial.number in shown or trial.number not in written]


def _whole(
    answer: Answer,
    trials: Sequence[Trial],
    written: Mapping[int, _Written],
    few: set[int],
) -> Detail | None:
    """The answer for all trials, of one for a few; None where these are not written as expected."""
    head = finite_json(answer.body)
    texts = {number: each.text for number, each in written.items()}
    shown = {trial["number"]: trial for trial in head.pop("trials")}
    alike = all(json.loads(texts[number]) == shown.get(number) for number in few & texts.keys())
    if head["is_preferential"] or not alike or few != shown.keys():
        return None
    texts |= {number: json.dumps(shown[number]).encode() for number in few - texts.keys()}
    candidates = [_candidate(trial) for trial in trials]
    directions = head["directions"]
    if len(directions) > 1 and not all(_is_finite(each) for each in candidates):
        return None  # the dashboard has a rank for infinities
    best = best_of(candidates, directions)
    head["best_trials"] = [json.loads(texts[number]) for number in best]
    body = json.dumps(head).encode()
    return Detail(answer.with_body(body), tuple(texts[trial.number] for trial in trials))


def _is_finite(candidate: Candidate) -> bool:
    return all(math.isfinite(value) for value in candidate.values or ())


def _candidate(trial: Trial) -> Candidate:
    return Candidate(
        trial.number,
        trial.values if trial.state.name == "COMPLETE" else None,
        anchor=trial.user_attrs.get("kind") == "anchor",
        feasible=all(missed <= 0 for missed in trial.system_attrs.get(CONSTRAINTS, ())),
    )
