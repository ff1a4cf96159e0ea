"""What a resumed study must share with its record: its settings, its weights, its start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.plan.plan import Plan, unanchored_trials
from mergesearch.search.record.array_text import decode_array, encode_array
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.runs.start.scores import take_scores
from mergesearch.search.runs.start.warm_start import WarmStart, find_warm_start, with_warm_start
from mergesearch.search.spec.code import code_revisions
from mergesearch.search.spec.comparison import (
    conflicts,
    differences,
    listed,
    searched_keys,
)
from mergesearch.search.spec.renamed import with_new_names
from mergesearch.search.spec.sections import StartSection, StrategySection
from mergesearch.search.strategies.auto import choose_unrecorded
from mergesearch.search.strategies.table import AUTO


def check_same_study(plan: Plan, log: TrialLog, *, mended: bool = False) -> None:
    """Refuse another study of the same name in the same database, whatever folder it came from.

    Args:
        plan: The study with the budget that it began with.
        log: Its trial log.
        mended: Whether the functions of evaluators may have other code.

    Raises:
        RunFolderError: If the recorded study differs.
    """
    if plan.spec.storage is None:
        return  # the run folder, which holds the journal, has been checked
    recorded: dict[str, Any] | None = log.get_attr("study")
    ours = searched_keys(plan.spec)
    if recorded is None:
        log.set_attr("study", ours)
        return
    changed = conflicts(with_new_names(recorded), ours, mended=mended)
    if changed:
        raise RunFolderError(
            f"storage: expected the study that it holds under the name {plan.spec.name!r}, "
            f"received one that differs in {listed(changed)}; restore these keys or choose "
            "another name"
        )
    if mended and differences(with_new_names(recorded), ours):
        log.set_attr("study", ours)


def check_same_weights(plan: Plan, log: TrialLog) -> None:
    """Refuse to resume on other weights than the recorded trials were measured with.

    Raises:
        InputError: If base or an expert has other weights now.
    """
    sources = (plan.template.base, *plan.template.experts)
    fingerprints = [source.fingerprint for source in sources]
    recorded: list[str] | None = log.get_attr("fingerprints")
    if plan.layout is None:
        return
    if recorded is None or (recorded != fingerprints and not _has_results(log)):
        log.set_attr("fingerprints", fingerprints)
        return
    for source, now, then in zip(sources, fingerprints, recorded, strict=True):
        if now != then:
            raise InputError(
                f"{source.path}: expected the weights that the recorded trials used "
                f"({then[:12]}), received others ({now[:12]}); restore them or choose another --run"
            )


def check_same_code(plan: Plan, log: TrialLog) -> None:
    """Refuse to resume with other code than the recorded trials were measured with.

    That of plug-ins is known by their versions, that of the user's operator and strategy by its
    digest.

    Raises:
        RunFolderError: If it differs.
    """
    ours = code_revisions(plan.spec)
    recorded: dict[str, str] | None = log.get_attr("code")
    if recorded is None or (recorded != ours and not _has_results(log)):
        if ours:
            log.set_attr("code", ours)
        return
    for name in sorted({*recorded, *ours}):
        then = recorded.get(name, "none")
        now = ours.get(name, "none")
        if then != now:
            raise RunFolderError(
                f"{name}: expected the code that the recorded trials used ({then}), received "
                f"another ({now}); restore it or choose another --run"
            )


def _has_results(log: TrialLog) -> bool:
    """Whether anything was measured that other weights or other code would change."""
    measured = any(record.state in ("complete", "partial") for record in log.records)
    return measured or bool(log.results.references("search"))


def with_recorded_strategy(plan: Plan, log: TrialLog) -> Plan:
    """The plan with the strategy that the run began with, where the study leaves it to ``auto``.

    The rule may choose another one in a later version, which could not replay the record.
    """
    if plan.spec.strategy.name != AUTO:
        return plan
    recorded: str | None = log.get_attr("strategy")
    if recorded is None:
        recorded = plan.strategy.name
        if any(record.kind == "search" for record in log.records):
            left = unanchored_trials(plan.spec, plan.evaluator, len(plan.anchors))
            recorded = choose_unrecorded(plan.space.lower.size, len(plan.objectives), left)
        log.set_attr("strategy", recorded)
    return replace(plan, strategy=StrategySection(name=recorded))


def with_recorded_start(plan: Plan, log: TrialLog) -> Plan:
    """The plan with what it takes from other runs: where it begins, and their scores.

    Both are recorded, so that a resumed study needs the other runs no more.
    """
    section = plan.spec.start
    if section is None:
        return plan
    begun = _with_recorded_origin(plan, section, log) if section.has_origin else plan
    if section.scores is None:
        return begun
    return replace(begun, notes=(*begun.notes, *take_scores(begun, log, section.scores)))


def _with_recorded_origin(plan: Plan, section: StartSection, log: TrialLog) -> Plan:
    """The plan that begins where other runs say."""
    recorded: str | None = log.get_attr("start")
    if recorded is None:
        found = find_warm_start(plan, section)
        assert found.point is not None
        # The start comes last: where it is recorded, its notes are too.
        log.set_attr("start notes", list(found.notes))
        recorded = encode_array(found.point)
        log.set_attr("start", recorded)
    notes = tuple(log.get_attr("start notes") or ())
    return with_warm_start(plan, WarmStart(decode_array(recorded), notes))
