"""Exports trials: their models or bundles, and the scores once more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.extensions.references import is_reference
from mergesearch.merging.mixture.exporting import export_mixture
from mergesearch.merging.models.model_classes import is_of_diffusers
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.plan.heads import used_heads
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.agreement import Agreement
from mergesearch.search.runs.card_facts import about_trial, facts_of
from mergesearch.search.runs.exported import export_bundle, rescore
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.node_cache import arena_folder

#: What is said where a second score is not the recorded one.
DISAGREES = "the exported model does not score as recorded; did device, threads or versions change?"


@dataclass(frozen=True)
class Storing:
    """How merged tensors are stored.

    Attributes:
        dtype: Of all of them, or None for the base's own.
        shard_bytes: Size above which weights are split over several files.
    """

    dtype: str | None = None
    shard_bytes: int = 5_000_000_000


#: As the base is.
AS_BASE = Storing()


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
    storing: Storing = AS_BASE,
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
        storing: How merged tensors are stored. In another dtype than the base's they are scored
            again, but not compared with the record.

    Raises:
        InputError: If the study merges no checkpoints, there is no such head, or the folder cannot
            be written.
    """
    if opened.plan.layout is None:
        raise InputError(
            f"{opened.folder.path}: expected a study of checkpoints, received an analytic problem: "
            "nothing to export"
        )
    routing = dict(record.recipe.routing)
    result: dict[str, Any] = {
        "trial": record.number,
        "out": str(out),
        "routing": routing.get("method"),
    }
    if routing:
        lines = [_write_bundle(opened, record, out, overwrite, head, storing)]
    elif record.recipe.mixture:
        lines = _write_mixture(opened, record, out, overwrite, head, storing)
    else:
        exported = export_model(
            record.recipe,
            out,
            facts=facts_of(opened, record.number),
            shard_bytes=storing.shard_bytes,
            overwrite=overwrite,
            dtype=storing.dtype,
            threads=usable_cores(),
            head=head,
            about=about_trial(opened, record),
        )
        result["rounding"] = exported.rounding.share
        lines = [f"trial {record.number} exported to {out}, {exported.rounding.sentence()}"]
    others = _other_heads(opened, head)
    if others and rescored:
        lines.append(f"not scored again: items of {', '.join(others)} need other heads")
    if rescored and record.state == "complete" and not others:
        again = _scored_again(opened, record, out, head, storing)
        result |= again.result
        lines += again.lines
    return Exported(result, lines)


def export_front(
    opened: Run, out: Path, *, overwrite: bool, rescored: bool, storing: Storing = AS_BASE
) -> Exported:
    """Write the model of every member of the recommended front, each into a numbered folder.

    Args:
        opened: The run.
        out: Folder for these folders, such as ``01-trial-17``.
        overwrite: Replace folders that are not empty.
        rescored: Whether to score exported models against the record.
        storing: How merged tensors are stored.

    Raises:
        InputError: As :func:`export_trial`, or if no trial is complete.
    """
    members = [record.number for record in opened.report_data().recommended]
    if not members:
        raise InputError(f"{opened.folder.path}: expected a front, received no complete trial")
    exported = [
        export_trial(
            opened,
            opened.trial(number),
            out / f"{place:02d}-trial-{number}",
            overwrite=overwrite,
            rescored=rescored,
            storing=storing,
        )
        for place, number in enumerate(members, 1)
    ]
    agrees = all(each.result.get("agrees", True) for each in exported)
    lines = [line for each in exported for line in each.lines]
    return Exported({"front": [each.result for each in exported], "agrees": agrees}, lines)


def _write_bundle(
    opened: Run,
    record: TrialRecord,
    out: Path,
    overwrite: bool,
    head: str | None,
    storing: Storing,
) -> str:
    """Write a trial whose merge depends on its input, and say so."""
    routing = dict(record.recipe.routing)
    if head is not None:
        raise InputError(f"head: expected none with {routing['method']}, received {head!r}")
    if storing != AS_BASE:
        raise InputError(
            f"dtype: expected the base's own and one shard size with {routing['method']}, received "
            "others"
        )
    facts = facts_of(opened, record.number)
    export_bundle(opened, record, out, facts=facts, overwrite=overwrite, threads=usable_cores())
    what = f"not a single checkpoint: {routing['method']} merges for each {routing['per']}"
    return f"trial {record.number} exported to {out}, {what}; README.md there says how to load it"


def _write_mixture(
    opened: Run,
    record: TrialRecord,
    out: Path,
    overwrite: bool,
    head: str | None,
    storing: Storing,
) -> list[str]:
    """Write a trial of one mixture, and say what became of its experts."""
    made = export_mixture(
        record.recipe,
        out,
        facts=facts_of(opened, record.number),
        shard_bytes=storing.shard_bytes,
        overwrite=overwrite,
        dtype=storing.dtype,
        head=head,
        memo=Memo(arena_folder(worker_spec(opened.plan, opened.folder).arenas) / "shared"),
    )
    counts = ", ".join(str(len(block.groups)) for block in made.plan.blocks)
    first = f"trial {record.number} exported to {out}, {counts} different experts in its blocks"
    return [first, *made.notes]


def _scored_again(
    opened: Run, record: TrialRecord, out: Path, head: str | None, storing: Storing
) -> Exported:
    """The scores of an exported model, compared with the record where it is stored alike."""
    again = rescore(opened, record, out, whole=head is not None)
    values = dict(again.measurement.values)
    result: dict[str, Any] = {"split": again.split, "values": values}
    verdict = f"stored as {storing.dtype}, so not compared with the record"
    if storing.dtype is None:
        result |= vars(again.agreement)
        verdict = _verdict(again.agreement)
    figures = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
    how = _loader(opened, record)
    told = f"loaded with {how} and scored again on {again.split} items: {figures} ({verdict})"
    return Exported(result, [told])


def _loader(opened: Run, record: TrialRecord) -> str:
    """What an exported model is loaded with."""
    if record.recipe.routing:
        return "mergesearch"
    if is_reference(opened.plan.evaluator.model_class or ""):
        return "the study's function"
    family = opened.plan.family
    assert family is not None
    return "diffusers" if is_of_diffusers(family.base.config) else "transformers"


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
