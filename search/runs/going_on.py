"""Going on with a run that was interrupted or has ended: with another budget, or with failures."""

from __future__ import annotations

from mergesearch.merging import RunFolderError
from mergesearch.search.grammar import counted
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.allowances import Allowance, add_allowance, allowances
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.study_attributes import MENDED, SEARCHED
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import standing_failures
from mergesearch.search.report.saved import forget_saved
from mergesearch.search.spec.comparison import code_changes, differences, listed
from mergesearch.search.spec.sections import BudgetSection, StudySpec
from mergesearch.search.study.budget import Spent, spent


def go_on(
    plan: Plan,
    spec: StudySpec,
    recorded: StudySpec,
    log: TrialLog,
    folder: RunFolder,
    *,
    retry_failed: bool,
) -> None:
    """Take back the end of a study that has more to do, with what it may spend now.

    The order of writes matters: wherever the process dies, the same call goes on from there, and
    the old budget gives the old result.

    Args:
        plan: The study with the budget that it began with.
        spec: The study as it is given now.
        recorded: The study of the run folder.
        log: Its trial log.
        folder: Its run folder.
        retry_failed: Whether failed trials are to be measured again.

    Raises:
        RunFolderError: If more has run than the budget allows.
    """
    _note_mended(spec, recorded, log)
    known = allowances(log)
    budget = spec.budget
    before = known[-1].budget if known else plan.spec.budget
    changed = budget != before
    failed_scores = log.results.failed_scores() if retry_failed else []
    if changed:
        _check_enough(
            budget, before, spent(log.records, lambda n: plan.evaluator.cost("search", n))
        )
    if changed or failed_scores or (retry_failed and standing_failures(log.records)):
        forget_saved(folder.path)
        if changed and not known:
            add_allowance(log, Allowance(before))
        log.results.reopen()
        for split, number in failed_scores:
            log.results.forget_score(split, number)
        if changed and log.get_attr(SEARCHED):
            log.set_attr(SEARCHED, False)
    folder.renew(spec)


def _note_mended(spec: StudySpec, recorded: StudySpec, log: TrialLog) -> None:
    """Record that functions of evaluators have other code than earlier scores."""
    code = code_changes(differences(recorded.to_dict(), spec.to_dict()))
    measured = sum(record.state in ("complete", "partial") for record in log.records)
    if code and measured:
        line = (
            f"{listed(code)}: the first {counted(measured, 'trial')} with results keep the scores "
            "of the earlier code"
        )
        log.set_attr(MENDED, [*(log.get_attr(MENDED) or ()), line])


def _check_enough(budget: BudgetSection, before: BudgetSection, used: Spent) -> None:
    """Refuse limits that are lower than before and have been passed.

    Raises:
        RunFolderError: In one line.
    """
    for key in type(budget).model_fields:
        limit = getattr(budget, key)
        if limit is not None and limit != getattr(before, key) and limit < getattr(used, key):
            raise RunFolderError(
                f"budget.{key}: expected at least {getattr(used, key):.6g}, which this run has "
                f"spent, received {limit:g}; give it that or more, or choose another --run"
            )
