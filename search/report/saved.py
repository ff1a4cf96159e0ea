"""Keeps the data of a report beside it, and reads them back without the study's inputs.

The file holds what tables, sentences and figures need: values, the scores of the final choice item
by item, and what was made of points and recipes (:class:`mergesearch.search.report.kept.Kept`).
Base, experts, data and the trial log may be gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.evaluators import Objective
from mergesearch.search.front import Normaliser
from mergesearch.search.record.array_text import pack_items, unpack_items
from mergesearch.search.record.trial_record import Score, TrialSummary, Verdict
from mergesearch.search.report.coefficients import kept_of
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import HeatMap, Kept
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.workers.messages import Failure

#: Name of the file in a run folder.
FILE = "report_data.json"
#: Counts up when an older file can no longer be read.
FORMAT = 1
#: What of :class:`ReportData` is plain JSON as it is.
PLAIN = (
    *("study", "experts", "names", "wall_seconds", "trials_per_worker", "transductive", "repeats"),
    *("search_items", "warnings", "set_aside"),
)
#: The same, but missing in older files.
LATER = ("untouched", "lineages", "predicted_seconds")
#: Those of both that JSON gives back as lists.
TUPLES = ("experts", "names", "warnings", "set_aside", "lineages")
_SUMMARY = [field.name for field in fields(TrialSummary)]


def saved_text(data: ReportData) -> str:
    """The data of a report as JSON text."""
    content = {
        "format": FORMAT,
        **{name: getattr(data, name) for name in (*PLAIN, *LATER)},
        "objectives": [vars(objective) for objective in data.objectives],
        "weights": np.asarray(data.weights).tolist(),
        "lower": np.asarray(data.lower).tolist(),
        "upper": np.asarray(data.upper).tolist(),
        "resolved": without_secrets(data.resolved),
        "fingerprint": without_secrets(data.fingerprint),
        "scale": None if data.scale is None else data.scale.to_dict(),
        "verdict": None if data.verdict is None else _verdict_dict(data.verdict),
        "kept": _kept_dict(kept_of(data)),
        "records": [_summary_dict(record) for record in data.records],
    }
    return json.dumps(content, default=str) + "\n"


def saved_data(folder: Path) -> ReportData | None:
    """The data of the report in a run folder; None where there are none that can be read.

    A file that is damaged or older than this version is as good as none: the trial log has
    everything.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return _data(content, str(folder)) if content["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def forget_saved(folder: Path) -> None:
    """Remove the file before the trial log changes, so that it never says less than the log."""
    (folder / FILE).unlink(missing_ok=True)


def _data(content: Mapping[str, Any], run: str) -> ReportData:
    verdict = None if content["verdict"] is None else _verdict(content["verdict"])
    test = {} if verdict is None else verdict.scores.get("test", {})
    plain: dict[str, Any] = {name: content[name] for name in PLAIN}
    plain |= {name: content[name] for name in LATER if name in content}
    for name in TUPLES:
        plain[name] = tuple(plain.get(name, ()))
    return ReportData(
        **plain,
        run=run,
        objectives=tuple(Objective(**each) for each in content["objectives"]),
        weights=content["weights"],
        records=[_summary(each) for each in content["records"]],
        verdict=verdict,
        lower=content["lower"],
        upper=content["upper"],
        resolved=content["resolved"],
        fingerprint=content["fingerprint"],
        scale=None if content["scale"] is None else Normaliser.from_dict(content["scale"]),
        items={number: score.items for number, score in test.items()},
        kept=_kept(content["kept"]),
    )


def _summary_dict(record: TrialSummary) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in _SUMMARY}
    failure = None if record.failure is None else vars(record.failure)
    return {name: each for name, each in values.items() if each} | {
        "number": record.number,
        "name": record.name,
        "failure": failure,
    }


def _summary(content: Mapping[str, Any]) -> TrialSummary:
    failure = content["failure"]
    return TrialSummary(**{**content, "failure": None if failure is None else Failure(**failure)})


def _verdict_dict(verdict: Verdict) -> dict[str, Any]:
    scores = {
        split: {number: _score_dict(score) for number, score in by_trial.items()}
        for split, by_trial in verdict.scores.items()
    }
    chosen = ("winner", "front", "leaders", "front_estimated")
    return {name: getattr(verdict, name) for name in chosen} | {"scores": scores}


def _verdict(content: Mapping[str, Any]) -> Verdict:
    return Verdict(
        winner=content["winner"],
        front=tuple(content["front"]),
        leaders=tuple(content["leaders"]),
        scores={
            split: {int(number): _score(score) for number, score in by_trial.items()}
            for split, by_trial in content["scores"].items()
        },
        front_estimated=tuple(content["front_estimated"]),
    )


def _score_dict(score: Score) -> dict[str, Any]:
    return {
        "values": dict(score.values),
        "errors": dict(score.errors),
        "violations": dict(score.violations),
        "items": {name: pack_items(each) for name, each in score.items.items()},
        "weights": {name: pack_items(each) for name, each in score.weights.items()},
    }


def _score(content: Mapping[str, Any]) -> Score:
    packed = {
        key: {name: unpack_items(each) for name, each in content[key].items()}
        for key in ("items", "weights")
    }
    return Score(content["values"], content["errors"], violations=content["violations"], **packed)


def _kept_dict(kept: Kept) -> dict[str, Any]:
    heat = kept.coefficients
    return {
        "estimates": {number: each.tolist() for number, each in kept.estimates.items()},
        "members": kept.members,
        "coefficients": None if heat is None else asdict(heat) | {"values": heat.values.tolist()},
        "routing": dict(kept.routing),
        "means": dict(kept.means),
        "directions": kept.directions,
    }


def _kept(content: Mapping[str, Any]) -> Kept:
    heat = content["coefficients"]
    return Kept(
        estimates={int(number): np.array(each) for number, each in content["estimates"].items()},
        members=tuple(content["members"]),
        coefficients=None
        if heat is None
        else HeatMap(
            trial=heat["trial"],
            rows=tuple(heat["rows"]),
            columns=tuple(heat["columns"]),
            values=np.array(heat["values"]),
        ),
        routing=content["routing"],
        means={int(number): tuple(each) for number, each in content["means"].items()},
        directions=tuple(content["directions"]),
    )
