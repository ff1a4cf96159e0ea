"""What a study measures beside its trials: references, re-evaluated scores, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergesearch.evaluators import Split
from mergesearch.merging import RunFolderError
from mergesearch.search.record.array_text import pack_items
from mergesearch.search.record.attributes import unpacked
from mergesearch.search.record.study_attributes import StudyAttributes
from mergesearch.search.record.trial_record import Score, TrialRecord, Verdict


class StudyResults:
    """Results that belong to a study as a whole.

    They are attributes of the study and not trials, because they were measured on other items and
    must not enter the rankings of a dashboard.

    Args:
        attributes: Where they are kept.
        records: The log's own list of trials.
    """

    def __init__(self, attributes: StudyAttributes, records: Sequence[TrialRecord]) -> None:
        self._attributes = attributes
        self._records = records

    def set_score(self, split: Split, number: int, score: Score | None) -> None:
        """Record a re-evaluation on validation or test items; None: it failed."""
        value = None
        if score is not None:
            items = {key: pack_items(scores) for key, scores in score.items.items()}
            value = {"values": dict(score.values), "errors": dict(score.errors), "items": items}
            value["violations"] = dict(score.violations)
            uneven = {key: each for key, each in score.weights.items() if np.ptp(each) > 0}
            value["weights"] = {key: pack_items(each) for key, each in uneven.items()}
            value["resampled"] = {k: pack_items(each) for k, each in score.resampled.items()}
        self._attributes.set(f"score:{split}:{number}", {"score": value})

    def score(self, split: Split, number: int) -> tuple[bool, Score | None]:
        """Whether a re-evaluation is recorded, and its score (None when it failed)."""
        entry = self._attributes.get(f"score:{split}:{number}")
        if entry is None:
            return False, None
        score = entry["score"]
        if score is None:
            return True, None
        where = f"{self._attributes.where}: score of trial {number} on {split} items"
        items = unpacked(score["items"], where)
        weights = unpacked(score.get("weights", {}), where)
        drawn = unpacked(score.get("resampled", {}), where)
        missed = score.get("violations", {})
        return True, Score(score["values"], score["errors"], items, missed, weights, drawn)

    def set_reference(self, split: Split, name: str, means: Mapping[str, float]) -> None:
        """Record what a model that objectives are relative to scores in every domain of a split."""
        self._attributes.set(
            f"references:{split}", dict(self.references(split)) | {name: dict(means)}
        )

    def references(self, split: Split) -> Mapping[str, Mapping[str, float]]:
        """Reference model -> ``metric/domain`` -> value, of those that are recorded."""
        return self._attributes.get(f"references:{split}") or {}

    def set_verdict(self, verdict: Verdict) -> None:
        """Record the final choice; its scores have been recorded one by one."""
        self._attributes.set(
            "verdict",
            {
                "winner": verdict.winner,
                "front": verdict.front,
                "leaders": verdict.leaders,
                "front_estimated": verdict.front_estimated,
            },
        )

    def reopen(self) -> None:
        """Take back the final choice, so that the study goes on; measured scores stay."""
        if self._attributes.get("verdict") is not None:
            self._attributes.set("repeats", None)
            self._attributes.set("verdict", None)

    def failed_scores(self) -> list[tuple[Split, int]]:
        """Split and trial of the re-evaluations that failed."""
        splits: tuple[Split, ...] = ("validation", "test")
        return [
            (split, record.number)
            for split in splits
            for record in self._records
            if self.score(split, record.number) == (True, None)
        ]

    def forget_score(self, split: Split, number: int) -> None:
        """Let a re-evaluation be made again."""
        self._attributes.set(f"score:{split}:{number}", None)

    def verdict(self) -> Verdict | None:
        """The recorded final choice, or None while the study is unfinished.

        Raises:
            RunFolderError: If it names trials that are not recorded.
        """
        recorded = self._attributes.get("verdict")
        if recorded is None:
            return None
        self._check_known(recorded)
        scores: dict[Split, dict[int, Score]] = {}
        for split in ("validation", "test"):
            known = {record.number: self.score(split, record.number)[1] for record in self._records}
            scores[split] = {number: score for number, score in known.items() if score is not None}
        return Verdict(
            recorded["winner"],
            tuple(recorded["front"]),
            tuple(recorded["leaders"]),
            scores,
            tuple(recorded.get("front_estimated", ())),
        )

    def _check_known(self, verdict: Mapping[str, Any]) -> None:
        """Refuse a choice of trials that are not recorded."""
        chosen = [verdict["winner"], *verdict["front"], *verdict["leaders"]]
        last = max([*chosen, *verdict.get("front_estimated", ())])
        if last >= len(self._records):
            raise RunFolderError(
                f"{self._attributes.where}: verdict: expected trials among the "
                f"{len(self._records)} that are recorded, received {last}; lines of the journal "
                "are lost"
            )
