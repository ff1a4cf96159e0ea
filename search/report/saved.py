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
from mergesearch.merging import InputError, RunFolderError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.reading import MIB
from mergesearch.merging.foreign.shown import shown
from mergesearch.search.front import Normaliser
from mergesearch.search.record.array_text import pack_items, unpack_items
from mergesearch.search.record.report_shapes import SavedShape
from mergesearch.search.record.shapes import conform
from mergesearch.search.record.trial_record import Score, TrialSummary, Verdict
from mergesearch.search.report.coefficients import kept_of
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import Between, Expected, HeatMap, Kept
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.workers.messages import Failure

#: Name of the file in a run folder.
FILE = "report_data.json"
#: The largest file that is read; one of 10^5 trials has about 100 MB.
SIZE_LIMIT = 1024 * MIB
#: Counts up when an older file can no longer be read.
FORMAT = 1
#: What of :class:`ReportData` is plain JSON as it is.
PLAIN = (
    *("study", "experts", "names", "wall_seconds", "trials_per_worker", "transductive", "repeats"),
    *("search_items", "warnings", "set_aside"),
)
#: The same, but missing in older files.
LATER = ("untouched", "lineages", "predicted_seconds", "tolerances")
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
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = read_json(file, RunFolderError, limit=SIZE_LIMIT)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return None
        data = _data(conform(SavedShape, content, str(file)), str(folder))
        check_data(data, str(file))
    except (InputError, ValueError):  # ValueError: rows of unequal lengths
        return None
    return data


def check_data(data: ReportData, where: str) -> None:
    """Refuse data that do not fit together: values, trials and dimensions that are missing.

    Args:
        data: As they were read.
        where: The file, as errors name it.

    Raises:
        RunFolderError: In one line.
    """
    names = {objective.name for objective in data.objectives}
    for record in data.records:
        if record.item_count == 0 and not record.values:
            continue  # it took gradient steps only
        if record.state in ("complete", "partial") and record.values.keys() != names:
            raise RunFolderError(
                f"{where}: trial {record.number}: expected a value for each of {len(names)} "
                f"objectives, received {shown(list(record.values))}"
            )
    known = {record.number for record in data.records if record.state == "complete"}
    for chosen in _chosen(data):
        if chosen not in known:
            raise RunFolderError(
                f"{where}: expected the final choice among trials that are complete, received "
                f"trial {shown(chosen)}; its record is lost"
            )
    _check_sizes(data, where)
    if any(values is not None and values.keys() != names for values in data.repeats):
        raise RunFolderError(f"{where}: repeats: expected a value for each objective")
    for split, scores in {} if data.verdict is None else data.verdict.scores.items():
        for number, score in scores.items():
            if score.values.keys() != names:
                raise RunFolderError(
                    f"{where}: score of trial {number} on {split} items: expected a value for each "
                    f"of {len(names)} objectives, received {shown(list(score.values))}"
                )


def _check_sizes(data: ReportData, where: str) -> None:
    """Refuse lists whose lengths do not fit together."""
    count = len(data.objectives)
    kept = data.kept or Kept()
    sizes = [count if data.scale is None else data.scale.low.size]
    sizes += [each.size for each in kept.estimates.values()]
    expected = () if kept.between is None else kept.between.expected
    sizes += [len(e) for each in expected for e in (each.weights, each.values, each.errors)]
    bounds = {len(data.names), len(data.lower), len(data.upper)}
    heat = kept.coefficients
    blocks = () if heat is None else heat.values.shape
    named = () if heat is None else (len(heat.rows), len(heat.columns))
    if set(sizes) - {count} or len(bounds) > 1 or blocks != named:
        raise RunFolderError(
            f"{where}: expected scale, bounds and coefficients of one size, received others"
        )


def _chosen(data: ReportData) -> set[int]:
    """Trials that the final choice and the estimates name."""
    verdict = data.verdict
    chosen: set[int] = set()
    if verdict is not None:
        chosen |= {verdict.winner, *verdict.front, *verdict.leaders, *verdict.front_estimated}
        chosen |= {number for scores in verdict.scores.values() for number in scores}
    if data.kept is not None:
        chosen |= {*data.kept.estimates, *data.kept.members, *data.kept.means}
    return chosen


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
        objectives=tuple(Objective(e["name"], e["direction"]) for e in content["objectives"]),
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
    return {name: each for name, each in values.items() if each or each == 0} | {
        "number": record.number,
        "name": record.name,
        "failure": failure,
    }


def _summary(content: Mapping[str, Any]) -> TrialSummary:
    failure = content["failure"]
    known = {name: content[name] for name in _SUMMARY if name in content}
    made = None if failure is None else Failure(**{"detail": "", **failure})
    return TrialSummary(**{**known, "failure": made})


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
        front_estimated=tuple(content.get("front_estimated", ())),
    )


def _score_dict(score: Score) -> dict[str, Any]:
    return {
        "values": dict(score.values),
        "errors": dict(score.errors),
        "violations": dict(score.violations),
        "items": {name: pack_items(each) for name, each in score.items.items()},
        "weights": {name: pack_items(each) for name, each in score.weights.items()},
        "resampled": {name: pack_items(each) for name, each in score.resampled.items()},
    }


def _score(content: Mapping[str, Any]) -> Score:
    packed = {
        key: {name: unpack_items(each) for name, each in content.get(key, {}).items()}
        for key in ("items", "weights", "resampled")
    }
    violations = content.get("violations", {})
    return Score(content["values"], content["errors"], violations=violations, **packed)


def _kept_dict(kept: Kept) -> dict[str, Any]:
    heat = kept.coefficients
    return {
        "estimates": {number: each.tolist() for number, each in kept.estimates.items()},
        "members": kept.members,
        "coefficients": None if heat is None else asdict(heat) | {"values": heat.values.tolist()},
        "routing": dict(kept.routing),
        **({"mixture": dict(kept.mixture)} if kept.mixture else {}),
        "means": dict(kept.means),
        "directions": kept.directions,
        "between": None if kept.between is None else asdict(kept.between),
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
        mixture=content.get("mixture", {}),
        means={int(number): tuple(each) for number, each in content["means"].items()},
        directions=tuple(content["directions"]),
        between=_between(content.get("between")),
    )


def _between(content: Mapping[str, Any] | None) -> Between | None:
    if content is None:
        return None
    rows = [{key: tuple(each) for key, each in row.items()} for row in content["expected"]]
    return Between(tuple(Expected(**row) for row in rows), content["why"])
