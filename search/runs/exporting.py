"""Exports a trial: its model or bundle, the facts of the model card, and the scores once more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.evaluators import SPLITS
from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.plan.heads import used_heads
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.report.data import TRANSDUCTIVE
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.runs.agreement import Agreement
from mergesearch.search.runs.exported import export_bundle, rescore
from mergesearch.search.runs.opened import Run
from mergesearch.search.spec.comparison import evaluation_digest

#: What is said where a second score is not the recorded one.
DISAGREES = "the exported model does not score as recorded; did device, threads or versions change?"


@dataclass(frozen=True)
class Exported:
    """What an export came to, as ``mergesearch export`` prints it: for programs and for people."""

    result: dict[str, Any]
    lines: list[str]


def export_trial(
    opened: Run,
    record: TrialRecord,
    out: Path,
    *,
    overwrite: bool,
    rescored: bool,
    head: str | None = None,
) -> Exported:
    """Write a trial's model, and score it again where it has scores.

    Args:
        opened: The run.
        record: The trial.
        out: Folder to write.
        overwrite: Replace a folder that is not empty.
        rescored: Whether to score the exported model against the record.
        head: Expert whose head the model gets. It answers that expert's tasks alone, and is scored
            again only if these are all.

    Raises:
        InputError: If the study merges no checkpoints, there is no such head, or the folder cannot
            be written.
    """
    if opened.plan.layout is None:
        raise InputError(
            f"{opened.folder.path}: expected a study of checkpoints, received an analytic problem: "
            "nothing to export"
        )
    facts = _facts(opened, record.number)
    routing = dict(record.recipe.routing)
    result: dict[str, Any] = {
        "trial": record.number,
        "out": str(out),
        "routing": routing.get("method"),
    }
    if routing:
        if head is not None:
            raise InputError(f"head: expected none with {routing['method']}, received {head!r}")
        export_bundle(opened, record, out, facts=facts, overwrite=overwrite, threads=usable_cores())
        what = f"not a single checkpoint: {routing['method']} merges for each {routing['per']}"
        lines = [
            f"trial {record.number} exported to {out}, {what}; README.md there says how to load it"
        ]
    else:
        exported = export_model(
            record.recipe,
            out,
            facts=facts,
            overwrite=overwrite,
            threads=usable_cores(),
            head=head,
        )
        result["rounding"] = exported.rounding.share
        lines = [f"trial {record.number} exported to {out}, {exported.rounding.sentence()}"]
    others = _other_heads(opened, head)
    if others:
        lines.append(f"not scored again: items of {', '.join(others)} need other heads")
    if rescored and record.state == "complete" and not others:
        again = rescore(opened, record, out, whole=head is not None)
        values = dict(again.measurement.values)
        result |= {"split": again.split, "values": values} | vars(again.agreement)
        figures = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
        how = "mergesearch" if routing else "transformers"
        lines.append(
            f"loaded with {how} and scored again on {again.split} items: {figures} "
            f"({_verdict(again.agreement)})"
        )
    return Exported(result, lines)


def _other_heads(opened: Run, head: str | None) -> list[str]:
    """Heads that the study's items need beside the one that a model is exported with."""
    if head is None:
        return []
    return [name for name in used_heads(opened.plan.heads, opened.plan.evaluator) if name != head]


def _verdict(agreement: Agreement) -> str:
    """How a second score compares with the record, in words."""
    if agreement.identical:
        return "identical to the record"
    if agreement.agrees:
        return f"as close to the record as another device allows; {agreement.reason}"
    more = f"; {agreement.reason}" if agreement.reason else ""
    return f"DIFFERENT from the record{more}"


def _facts(opened: Run, number: int) -> dict[str, str]:
    """Scores for the model card, and what they were measured with."""
    record = opened.log.records[number]
    scores = {} if opened.verdict is None else opened.verdict.scores
    facts = {"study": opened.plan.spec.name, "trial": str(number)}
    for split in SPLITS:
        searched = Score(record.values, record.errors)
        score = searched if split == "search" else scores.get(split, {}).get(number)
        if score is None:
            continue
        for name, value in score.values.items():
            spread = f" ± {score.errors[name]:.4g}" if name in score.errors else ""
            facts[f"{name}, {split} items"] = f"{value:.4g}{spread}"
    facts |= _gains(opened, number)
    unrelated = opened.log.get_attr("lineage warnings")
    facts |= {"lineage": "; ".join(unrelated)} if unrelated else {}
    facts["evaluation settings"] = evaluation_digest(opened.plan.spec)
    if opened.plan.evaluator.transductive:
        facts["evaluation"] = TRANSDUCTIVE
    return facts


def _gains(opened: Run, number: int) -> dict[str, str]:
    """What the winner gains over all anchors, for its model card; nothing for other trials."""
    if opened.verdict is None or number != opened.verdict.winner:
        return {}
    data = opened.report_data()
    return {
        f"{gain.objective}, gain over the best of {gain.anchors} anchors": (
            f"{gain.low:+.4g} to {gain.high:+.4g} (95 % simultaneous interval, test items)"
        )
        for gain in gains(data, anchor_intervals(data))
    }
