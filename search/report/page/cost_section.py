"""The section of a report's page on what trials cost, beside what they were expected to cost."""

from __future__ import annotations

from html import escape

from mergesearch.search.grammar import counted
from mergesearch.search.report.costs import (
    Forecast,
    busy_share,
    forecast,
    measured_trials,
    timings,
)
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.page.elements import cells, table
from mergesearch.search.report.tables import MISSING

NUMERIC = (1, 2, 3, 4)


def cost_section(data: ReportData) -> str:
    """Counts of trials, times of the run and of its phases."""
    return _trials(data) + _times(data)


def _trials(data: ReportData) -> str:
    states = {
        state: sum(r.state == state for r in data.records)
        for state in ("complete", "failed", "running")
    }
    kinds = {
        kind: sum(r.kind == kind for r in data.records)
        for kind in ("anchor", "taken", "search", "recommended")
    }
    listed = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    trials = counted(len(data.records), "trial")
    facts = [f"{trials}: {listed}" if listed else trials]
    facts.append(", ".join(f"{count} {kind}" for kind, count in kinds.items() if count))
    known = sum(record.same_as is not None for record in data.records)
    merges = f"{counted(known, 'trial')} of a merge that was measured before, at no cost"
    facts.append(merges if known else "")
    facts.append(f"wall time {duration(data.wall_seconds)}")
    share = busy_share(data)
    if share is not None:
        facts.append(f"workers were busy {share:.0%} of their time")
    per_worker = ", ".join(f"{name}: {count}" for name, count in data.trials_per_worker.items())
    facts.append(f"trials per worker: {per_worker}" if per_worker else "")
    return "<ul>\n" + "".join(f"<li>{escape(fact)}</li>\n" for fact in facts if fact) + "</ul>\n"


def _times(data: ReportData) -> str:
    """What phases cost, beside what was expected of them."""
    finished = max(len(measured_trials(data)), 1)
    told = forecast(data)
    rows = []
    for phase, seconds in data.predicted_seconds.items():
        expected = duration(seconds) if seconds >= 1 else "below 1 s"
        rows.append(f"<tr>{cells([phase, expected, MISSING, '', '', ''], NUMERIC)}</tr>")
    measured = timings(data)
    for timing in measured:
        expected = MISSING if told is None else f"{told.seconds[timing.phase]:.1f} s"
        texts = [timing.phase, expected, f"{timing.seconds:.1f}", f"{timing.share:.1%}"]
        per_trial = f"{timing.seconds / finished:.3g}"
        bar = f'<td><span class="bar" style="width:{timing.share * 10:.2f}em"></span></td>'
        rows.append(f"<tr>{cells([*texts, per_trial], NUMERIC)}{bar}</tr>")
    total = sum(timing.seconds for timing in measured)
    expected = MISSING if told is None else f"{sum(told.seconds.values()):.1f} s"
    texts = ["all trials", expected, f"{total:.1f}", "", f"{total / finished:.3g}", ""]
    rows.append(f"<tr>{cells(texts, NUMERIC)}</tr>")
    head = ["phase", "predicted", "measured s", "share", "s / trial", ""]
    return table(head, rows, NUMERIC, name="cost") + ("" if told is None else _how(told))


def _how(told: Forecast) -> str:
    """Where the predictions of trials come from."""
    known = f"{counted(told.anchors, 'anchor')} took {sum(told.each.values()):.3g} s each"
    return (
        f"<p class=note>What is predicted for {counted(told.trials, 'trial')}: {known}, before the "
        "search began. Trials that were stopped early cost less, those with gradient steps more."
        "</p>\n"
    )


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
