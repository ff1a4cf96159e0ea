"""Checks across the sections of a study that need neither checkpoints nor data."""

from __future__ import annotations

from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging import InputError, MergesearchError
from mergesearch.merging.extensions.references import is_reference, known
from mergesearch.merging.operators import OPERATORS, get_operator
from mergesearch.search.plan.mixture import check_mixture_study, is_mixture_study
from mergesearch.search.redact import redact
from mergesearch.search.spec.auto_operator import AUTO_OPERATOR, auto_operator
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.storage_url import database_url, split_url
from mergesearch.search.strategies.table import STRATEGIES, check_options


def check_sections(spec: StudySpec) -> None:
    """Check operator, strategy, evaluators, storage and sources.

    Raises:
        InputError: With a line for each problem.
    """
    problems = section_problems(spec)
    if problems:
        raise InputError("\n".join(problems))


def section_problems(spec: StudySpec) -> list[str]:
    """A line for each thing that is wrong with the sections of a study."""
    checks = (_check_operator, _check_strategy, _check_kinds, _check_storage, _check_sources)
    problems = []
    for check in checks:
        try:
            check(spec)
        except MergesearchError as error:
            problems.append(str(error))
    return problems


def _check_operator(spec: StudySpec) -> None:
    if spec.operator.name == AUTO_OPERATOR:
        auto_operator(spec.operator)
    elif is_mixture_study(spec):
        check_mixture_study(spec)
    elif not _is_unknown(spec.operator.name):
        OPERATORS.check(spec.operator.name)
        get_operator(spec.operator.name).complete(spec.operator.options)


def _check_strategy(spec: StudySpec) -> None:
    if not _is_unknown(spec.strategy.name):
        STRATEGIES.check(spec.strategy.name)
        check_options(spec.strategy.name, spec.strategy.options)


def _check_kinds(spec: StudySpec) -> None:
    for evaluator in spec.evaluators:
        SECTIONS.check(evaluator.kind)


def _check_sources(spec: StudySpec) -> None:
    if spec.special.vocabulary == "common":
        raise InputError(
            "special.vocabulary: expected same, base or union in a study, whose items hold the "
            "base's token numbers, received common, which renumbers them"
        )
    if not is_mixture_study(spec) and (spec.base is None) != (not spec.experts):
        missing = "base" if spec.base is None else "experts"
        raise InputError(
            f"{missing}: expected both base and experts (or neither, for analytic problems)"
        )


def _is_unknown(name: str) -> bool:
    """Whether a name is that of an object of the user's that is not imported yet.

    It is once it is known that the study allows it, and then the sections are checked again.
    """
    return is_reference(name) and known(name) is None


def _check_storage(spec: StudySpec) -> None:
    """Refuse a password in plain text, as the study is copied to run folder and cluster."""
    url = spec.storage
    if url is None:
        return
    password = split_url(url, "storage").password
    if password and "${" not in password:
        raise InputError(
            "storage: expected the password as ${NAME}, to be read from the environment, "
            f"received it in plain text in {redact(url)}; or leave it to PGPASSWORD or ~/.pgpass"
        )
    database_url(url)
