"""What came out of a study, in sentences: for the console, the page and the dashboard's note."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.evaluators import Split
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.caveats import caveats
from mergesearch.search.report.coefficients import mixture, routing
from mergesearch.search.report.comparison import (
    Alternative,
    Comparison,
    TradeOff,
    compare,
    trade_off,
)
from mergesearch.search.report.data import TRANSDUCTIVE, ReportData
from mergesearch.search.report.gains import AnchorInterval, Gain, anchor_intervals, gains
from mergesearch.search.report.wording import (
    change,
    first_of,
    interval,
    plus_minus,
    size_of,
)


def sentences(data: ReportData) -> list[str]:
    """The outcome, a line for each objective, then everything to be careful about."""
    how = [f"{TRANSDUCTIVE.capitalize()}."] if data.transductive else []
    return [*headline(data), *caveats(data), *how]


def export_command(data: ReportData, number: int) -> str:
    """The command that writes trial ``number`` as a model folder."""
    target = f"{data.study}-trial-{number}"
    return (
        f"mergesearch export {shlex.quote(data.run)} --trial {number} --out {shlex.quote(target)}"
    )


def recipe_command(data: ReportData, number: int) -> str:
    """The command that prints the merge of trial ``number``."""
    return f"mergesearch recipe {shlex.quote(data.run)} --trial {number}"


def measure_commands(data: ReportData, weights: Sequence[float]) -> str:
    """The commands that write the merge which is expected for weights, and measure it."""
    pairs = zip(data.objectives, weights, strict=True)
    named = [f"{objective.name}={weight:.6g}" for objective, weight in pairs if weight]
    wanted = " ".join(f"--expected {shlex.quote(pair)}" for pair in named)
    study = shlex.quote(f"{data.run}/study.yaml")
    return (
        f"mergesearch recipe {shlex.quote(data.run)} {wanted} > compromise.yaml\n"
        f"mergesearch replay compromise.yaml --study {study}"
    )


def headline(data: ReportData) -> list[str]:
    """The outcome: which trial won or leads, what it trades, and a line for each objective."""
    leading = data.leading
    if leading is None:
        return ["No trial is complete yet."]
    title = "Winner" if data.winner is not None else "Best so far"
    named = f" ({leading.name})" if leading.name else ""
    first = f"{title}: trial {leading.number}{named}"
    routed = _routing(routing(data)) + _kept_experts(mixture(data))
    if data.best_anchor is None:
        return [f"{first}.{routed} No anchor is complete."]
    comparisons = compare(data)
    if leading is data.best_anchor:
        what = "no trial beat it" if data.winner is not None else "no trial has beaten it yet"
        return [
            f"{first}.{routed} It is the best anchor: {what}.",
            *(f"{_value(comparison)}{_optimism(comparison)}." for comparison in comparisons),
        ]
    intervals = anchor_intervals(data)
    lines = [_line(data.best_anchor, comparison, intervals) for comparison in comparisons]
    errors = {comparison.objective: comparison.winner_error for comparison in comparisons}
    lines += [_gain(gain, errors[gain.objective]) for gain in gains(data, intervals)]
    traded = trade_off(data)
    if traded is None:
        return [f"{first}.{routed}", *lines]
    changes = _changes(data, leading, traded.split, traded.improvements)
    than = f"than the best anchor ({data.best_anchor.name}) on {traded.split} items"
    return [
        f"{first}, a trade-off: {changes} {than}.{routed}",
        _alternative(data, leading, traded),
        *lines,
    ]


def _changes(
    data: ReportData, record: TrialSummary, split: Split, improvements: Mapping[str, float]
) -> str:
    """```speed` 0.011 better, `length` 0.004 worse``: what is worse comes last."""
    score = data.score(record, split)
    errors = {} if score is None else score.errors
    order = sorted(improvements, key=lambda name: (improvements[name] <= 0, improvements[name] < 0))
    return ", ".join(f"`{name}` {change(improvements[name], errors.get(name))}" for name in order)


def _alternative(data: ReportData, leading: TrialSummary, traded: TradeOff) -> str:
    """Which trial loses in no objective, by the items that decide, and how to export it."""
    alternative = traded.alternative
    split = traded.decided_on
    if alternative is None:
        return (
            f"Every trial of the search that was scored on {split} items loses to the best anchor "
            "on at least one objective there."
        )
    record = data.by_number[alternative.trial]
    changes = _changes(data, record, split, alternative.improvements[split])
    if record is leading:
        return (
            f"On {split} items, on which it was chosen, it loses on none of the objectives: "
            f"{changes}."
        )
    return (
        f"Trial {record.number} loses on none of the objectives: {changes} on {split} items"
        f"{_on_test_items(data, record, alternative)}. To export it: "
        f"`{export_command(data, record.number)}`."
    )


def _on_test_items(data: ReportData, record: TrialSummary, alternative: Alternative) -> str:
    """The alternative's figures on test items, or that there are none."""
    if data.verdict is None:
        return ""
    improvements = alternative.improvements.get("test")
    if improvements is None:
        return ", not measured on test items"
    return f", {_changes(data, record, 'test', improvements)} on test items"


def _routing(values: Mapping[str, Any]) -> str:
    """What an input-dependent merge is, if the trial is one."""
    if not values:
        return ""
    listed = ", ".join(
        f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float)
    )
    return (
        f" It is not a single checkpoint: {values['method']} merges for each {values['per']} "
        f"({listed})."
    )


def _kept_experts(values: Mapping[str, Any]) -> str:
    """How many experts each block keeps, if the trial is a merge inside one mixture."""
    if not values:
        return ""
    experts = values["experts"]
    blocks = ", ".join(map(str, experts)) if isinstance(experts, list) else f"{experts} by usage"
    return f" Its blocks keep {blocks} experts ({values['operator']})."


def _value(comparison: Comparison) -> str:
    value = plus_minus(comparison.winner, comparison.winner_error)
    return f"{comparison.objective}: {value} on {comparison.split} items"


def _line(anchor: TrialSummary, comparison: Comparison, intervals: Sequence[AnchorInterval]) -> str:
    """The leading trial in one objective: its value, the change, the interval, the optimism."""
    error = comparison.winner_error
    than = "to" if comparison.improvement == 0 else "than"
    line = (
        f"{_value(comparison)}, {change(comparison.improvement, error)} {than} the best anchor "
        f"({anchor.name})"
    )
    return f"{line}{_interval(anchor, comparison, intervals)}{_optimism(comparison)}."


def _interval(
    anchor: TrialSummary, comparison: Comparison, intervals: Sequence[AnchorInterval]
) -> str:
    """The interval of a change: the one that holds for all anchors at once, if there is one."""
    told: Comparison | AnchorInterval = comparison
    for each in intervals:
        if (each.objective, each.trial) == (comparison.objective, anchor.number):
            told = each
    if told.low is None or told.high is None:
        return ""
    shown = interval(told.low, told.high, comparison.winner_error)
    return f", 95 % interval {shown}" + ("" if told.paired else ", unpaired")


def _gain(gain: Gain, error: float | None) -> str:
    """Whether the winner is better than every anchor beyond noise, and the anchors that tie."""
    span = interval(gain.low, gain.high, error)
    kept = " that keeps the bounds" if gain.left_out else ""
    rivals = counted(gain.anchors, "anchor") + (" within the bounds" if gain.left_out else "")
    over = f"95 % interval of the gain over the best of {rivals} {span}"
    if gain.claimed:
        return f"{gain.objective}: better than every anchor{kept} ({over})."
    told = [f"; {what}: {first_of(names)}" for what, names in _rivals(gain).items() if names]
    return f"{gain.objective}: no gain over every anchor{kept} is shown ({over}){''.join(told)}."


def _rivals(gain: Gain) -> dict[str, tuple[str, ...]]:
    return {"ties": gain.ties, "better than the winner": gain.worse_than}


def _optimism(comparison: Comparison) -> str:
    """How much better the leading trial looked during the search than on test items."""
    optimism = comparison.optimism
    if optimism is None:
        return ""
    if optimism == 0:
        return "; it scored the same on the search items"
    direction = "better" if optimism > 0 else "worse"
    return (
        f"; it scored {size_of(optimism, comparison.winner_error)} {direction} on the search items"
    )
