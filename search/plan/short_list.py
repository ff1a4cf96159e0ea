"""The operators that ``operator: auto`` measures, by what data, policies, time and budget allow."""

from __future__ import annotations

from mergesearch.evaluators import Evaluator
from mergesearch.merging import InputError, Layout, Recipe, RecipeError
from mergesearch.merging.family.effort import preparation_seconds
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.operators import OPERATORS, Operator, get_operator
from mergesearch.merging.operators.blend import member_options
from mergesearch.search.plan.anchors import Anchor, default_anchors
from mergesearch.search.plan.plan import trials_of
from mergesearch.search.plan.preparing import CORE_RATES
from mergesearch.search.plan.survey import SCALES, Choice, Listed, Survey
from mergesearch.search.spec.auto_operator import AutoOperator, auto_operator
from mergesearch.search.spec.sections import StudySpec

#: Operators by how well they did on the digits zoo, at the best of their scales, the first of each
#: kind before a second (``experiments/0011-operator-auto``). Fisher is not among them: its runs of
#: the experts, which no estimate holds, took a hundred times as long as those of RegMean++.
CANDIDATES = (
    "regmean_pp",
    "iso_cts",
    "tsv",
    "wudi",
    "regmean",
    "iso_c",
    "optmerge",
    "knots",
)

#: Operators that the anchors of every study measure anyway.
FREE = ("task_arithmetic", "ties")

#: An operator is prepared for every anchor on search, validation and test items, and for the blend.
PREPARATIONS = 3 * len(SCALES) + 1

#: Shares of a study's trials, and of its seconds, that measuring operators may take.
SHARE_OF_TRIALS = 0.25
SHARE_OF_SECONDS = 0.25


def survey_of(
    spec: StudySpec, template: Recipe, family: ModelFamily, evaluator: Evaluator
) -> Survey:
    """The operators of a study, of which the first stand in for those that will be chosen.

    Args:
        spec: The resolved study, with ``operator: auto``.
        template: Task arithmetic on its experts, with coefficients 0.
        family: Its checkpoints.
        evaluator: Not opened.

    Raises:
        InputError: If an option is not allowed, or no operator is left.
    """
    options = auto_operator(spec.operator)
    _check(spec, options)
    listed = _listed(spec, options, family, evaluator)
    measured = [one.name for one in listed if not one.reason]
    if not measured:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in listed)
        raise InputError(f"operator.among: expected an operator that can be measured ({reasons})")
    members = tuple(measured[: options.keep])
    experts = len(template.experts)
    defaults = tuple(
        OPERATORS[name].default(experts, member_options(OPERATORS[name], options.calibration))
        for name in members
    )
    return Survey(
        template,
        listed,
        options.keep,
        options.calibration,
        FREE if options.among is None else (),
        Choice(members, defaults),
    )


def survey_anchors(survey: Survey, layout: Layout) -> tuple[Anchor, ...]:
    """The known merges of every study, and every listed operator at several coefficients."""
    known = default_anchors(survey.template, layout, None, OPERATORS[survey.template.operator])
    anchors = {anchor.recipe.digest: anchor for anchor in known}
    for anchor in survey.anchors(layout):
        anchors.setdefault(anchor.recipe.digest, anchor)
    return tuple(anchors.values())


def _listed(
    spec: StudySpec,
    options: AutoOperator,
    family: ModelFamily,
    evaluator: Evaluator,
) -> tuple[Listed, ...]:
    """Every candidate in order, with the reason why it is not measured."""
    seconds_left = _seconds(spec, options)
    room = min(options.most, _affordable(spec, evaluator))
    found: list[Listed] = []
    for name in options.among or CANDIDATES:
        operator = get_operator(name)
        reason = _unfit(operator, options, family, len(spec.experts))
        seconds = 0.0
        if not reason:
            full = member_options(operator, options.calibration)
            once = preparation_seconds(
                operator, family.layout, len(spec.experts), CORE_RATES, full, spec.workers.threads
            )
            seconds = PREPARATIONS * once
            if not room:
                reason = "enough others are measured"
            elif seconds > seconds_left:
                reason = f"expected to prepare for {seconds:.0f} s, {seconds_left:.0f} s are left"
        if not reason:
            room -= 1
            seconds_left -= seconds
        found.append(Listed(name, seconds, reason))
    return tuple(found)


def _unfit(
    operator: Operator,
    options: AutoOperator,
    family: ModelFamily,
    experts: int,
) -> str:
    """Why an operator cannot merge these experts with what is given; empty if it can."""
    if operator.needs and options.calibration is None:
        return "needs items to run the experts on (operator.calibration)"
    try:
        full = member_options(operator, options.calibration)
        operator.check(family.layout, experts, full)
        family.check(operator)
    except RecipeError as error:
        return str(error).removeprefix(f"operator {operator.name}: ")
    return ""


def _check(spec: StudySpec, options: AutoOperator) -> None:
    """Refuse what choosing an operator cannot be combined with."""
    for name in options.among or ():
        if get_operator(name).name in ("blend", "stack", "slerp", "average"):
            raise InputError(
                f"operator.among: expected operators whose rows are added to the base, received "
                f"{name}; leave it out (average is task_arithmetic with 1/K)"
            )
    if spec.anchors != "default":
        raise InputError(
            "anchors: expected default with operator auto, which chooses among anchors, received "
            f"{spec.anchors}"
        )
    if spec.start is not None:
        raise InputError(
            "start: expected none with operator auto, whose search begins at the best operator; "
            "leave it out, or name an operator"
        )
    if spec.special.batch_norm in ("merge", "recalibrate"):
        raise InputError(
            "special.batch_norm: expected base or refuse with operator auto, received "
            f"{spec.special.batch_norm}; name an operator"
        )


def _seconds(spec: StudySpec, options: AutoOperator) -> float:
    """Seconds of preparation that the study may spend on measuring operators."""
    given = 60 * options.minutes
    if spec.budget.seconds is None:
        return given
    return min(given, SHARE_OF_SECONDS * spec.budget.seconds)


def _affordable(spec: StudySpec, evaluator: Evaluator) -> int:
    """How many operators the budget pays for; at least two, so that there is a choice."""
    trials = trials_of(spec, evaluator)
    return len(OPERATORS) if trials is None else max(2, int(SHARE_OF_TRIALS * trials / len(SCALES)))
