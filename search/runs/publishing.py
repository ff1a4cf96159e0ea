"""What a run shows: the data of its report, the report files, and the dashboard's note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mergesearch.evaluators import SPLITS
from mergesearch.merging import Layout, MergesearchError, Recipe
from mergesearch.merging.mixture.in_recipe import mixture_of
from mergesearch.merging.recipe_file import recipe_text, shorthand_of
from mergesearch.search.dashboard.note import note_markdown, trial_note
from mergesearch.search.plan.known import passed_over
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.allowances import changes_after_test
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.study_attributes import LINEAGES, PREDICTED, SET_ASIDE
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import TrialRecord, TrialSummary
from mergesearch.search.report.between.expected import expected_at
from mergesearch.search.report.coefficients import mean_coefficients, with_kept
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.front_figures import front_figure, matrix_figure
from mergesearch.search.report.headline import export_command, recipe_command, sentences
from mergesearch.search.report.kept import Kept
from mergesearch.search.report.preference import parse_preference
from mergesearch.search.report.wording import plus_minus
from mergesearch.search.report.writing import write_report
from mergesearch.search.retry import reason
from mergesearch.search.spec.comparison import evaluation_digest
from mergesearch.search.study.budget import busy_seconds
from mergesearch.search.study.events import Event
from mergesearch.search.study.problem import study_normaliser
from mergesearch.spaces.groups import groupings_by_name
from mergesearch.spaces.widths_space import WidthsSpace

#: Members of the front that have a note of their own in the dashboard.
NOTED = 20
#: Dominated trials in the dashboard's figures: browsers fetch all of them again and again.
SHOWN_TRIALS = 300
#: Pixels of a figure's place in the dashboard.
SHOWN_HEIGHT = 450


def report_data(folder: RunFolder, plan: Plan, log: TrialLog) -> ReportData:
    """The plain data that a report is made of."""
    verdict = log.results.verdict()
    test_scores = {} if verdict is None else verdict.scores.get("test", {})
    left = passed_over(plan)
    has_anchors = any(record.kind == "anchor" for record in log.records)
    data = ReportData(
        study=plan.spec.name,
        run=str(folder.path),
        objectives=plan.objectives,
        weights=plan.weights.tolist(),
        records=log.records,
        verdict=verdict,
        layout=plan.layout,
        experts=tuple(expert.name for expert in plan.template.experts),
        names=plan.space.names,
        lower=plan.space.lower,
        upper=plan.space.upper,
        resolved=plan.spec.to_dict(),
        fingerprint=folder.environment() | {"evaluation settings": evaluation_digest(plan.spec)},
        wall_seconds=busy_seconds(log.records),
        trials_per_worker=dict(Counter(record.worker for record in log.records if record.worker)),
        scale=study_normaliser(plan, log.records) if has_anchors else None,
        items={number: score.items for number, score in test_scores.items()},
        transductive=plan.evaluator.transductive,
        repeats=log.get_attr("repeats") or (),
        search_items=plan.evaluator.size("search"),
        warnings=(*changes_after_test(log), *(log.get_attr("warnings") or ())),
        set_aside=tuple(log.get_attr(SET_ASIDE) or ()),
        untouched=left.sentence if left is not None else "",
        lineages=tuple(log.get_attr(LINEAGES) or ()),
        predicted_seconds=log.get_attr(PREDICTED) or {},
        means_at=lambda point: mean_coefficients(plan.space.decode(point).field).tolist(),
        tolerances=dict(getattr(plan.evaluator, "tolerances", {})),
    )
    # Layers of the leader may have other widths than those of the study.
    leading = data.leading if isinstance(plan.space, WidthsSpace) else None
    if not isinstance(leading, TrialRecord):
        return data
    return replace(data, layout=plan.layout_of(leading.recipe))


def publish(folder: RunFolder, plan: Plan, log: TrialLog) -> None:
    """Write the report, and what the dashboard shows; nothing before the first trial."""
    if not log.records:
        return
    data = with_kept(report_data(folder, plan, log))
    write_report(data, folder.path)
    with log.batched_writes():
        _show(data, log, _attach_recipes(data, folder, plan, log))


def recipe_as_text(recipe: Recipe, layout: Layout | None) -> str:
    """A merge as one would write it, or with offsets where coefficients vary inside tensors."""
    if recipe.mixture:
        return recipe_text(mixture_of(recipe).to_dict())
    written = None if layout is None else shorthand_of(recipe, layout, groupings_by_name(layout))
    return recipe_text(written or recipe.to_dict())


def expected_recipe(data: ReportData, plan: Plan, pairs: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The merge that is expected to suit ``NAME=WEIGHT`` pairs best, and comments with its scores.

    Raises:
        InputError: If the pairs do not fit the objectives.
        RunFolderError: If nothing can be expected.
    """
    preference = parse_preference(pairs, data.objectives, "--expected")
    weights = np.array([preference.get(objective.name, 0.0) for objective in data.objectives])
    point, told = expected_at(data, weights)
    scores = [
        f"# {objective.name}: {plus_minus(value, error)}"
        for objective, value, error in zip(data.objectives, told.values, told.errors, strict=True)
    ]
    head = "# Expected on search items, not measured, between the trials of the search:"
    return plan.space.decode(point), [head, *scores]


def _attach_recipes(
    data: ReportData, folder: RunFolder, plan: Plan, log: TrialLog
) -> Mapping[int, str]:
    """Offer the recipes of the winner and the front in the dashboard, once there is a winner.

    Returns:
        Trial -> address of its recipe there.
    """
    if data.winner is None:
        return {}
    front = data.recommended if len(data.objectives) > 1 else []
    numbers = dict.fromkeys([data.winner.number, *(each.number for each in front[:NOTED])])
    names = {number: f"recipe-of-trial-{number}.yaml" for number in numbers}
    recipes = {number: log.records[number].recipe for number in numbers}
    texts = {n: recipe_as_text(recipe, plan.layout_of(recipe)) for n, recipe in recipes.items()}
    files = {name: texts[n] for n, name in names.items()}
    addresses = log.shown.attach(files, folder.artifacts)
    return {number: addresses[name] for number, name in names.items()}


def _show(data: ReportData, log: TrialLog, recipes: Mapping[int, str]) -> None:
    """Set the figures of the dashboard, and the notes of the study and of trials that matter."""
    winner = None if data.winner is None else data.winner.number
    several = len(data.objectives) > 1
    log.shown.set_note(
        note_markdown(
            data.study,
            data.run,
            data.objectives,
            winner=winner,
            front=[record.number for record in data.recommended] if several else [],
            lines=sentences(data),
        )
    )
    leading = [] if data.leading is None else [data.leading]
    front = data.recommended if several else []
    shown = [*leading, *data.anchors, *front[:NOTED]]
    for record in {r.number: r for r in shown if r.state == "complete"}.values():
        log.shown.set_note(_trial_note(data, record, recipes.get(record.number, "")), record.number)
    pairs = matrix_figure(data, SHOWN_TRIALS) if len(data.objectives) == 3 else None
    figures = {"front": front_figure(data, SHOWN_TRIALS), "pairs": pairs}
    for name, figure in figures.items():
        if figure is not None:
            log.shown.set_figure(
                name, figure | {"layout": figure["layout"] | {"height": SHOWN_HEIGHT}}
            )


def _trial_note(data: ReportData, record: TrialSummary, recipe: str) -> str:
    """Name, scores, mean coefficients and commands of a trial, and the address of its recipe."""
    lines = [
        f"{objective.name} on {split} items: "
        + plus_minus(score.values[objective.name], score.errors.get(objective.name))
        for split in SPLITS
        if (score := data.score(record, split)) is not None
        for objective in data.objectives
        if objective.name in score.values
    ]
    lines += [
        f"misses {bound} on {split} items"
        for split in SPLITS
        if (score := data.score(record, split)) is not None
        for bound in score.missed
    ]
    kept = data.kept or Kept()
    means = zip(kept.directions, kept.means.get(record.number, ()), strict=False)
    listed = ", ".join(f"{name} {mean:.3g}" for name, mean in means)
    commands = {
        "Export it as a model folder": export_command(data, record.number),
        "Print its recipe": recipe_command(data, record.number),
    }
    lines += [f"mean coefficients: {listed}"] if listed else []
    return trial_note(label(record), lines, commands, recipe)


def publish_if_possible(
    folder: RunFolder, plan: Plan, log: TrialLog, notify: Callable[[Event], None]
) -> None:
    """:func:`publish`; a failure is only a warning, since the record itself is complete."""
    try:
        publish(folder, plan, log)
    except (OSError, MergesearchError) as error:
        notify(
            Event("warning", f"no report: {reason(error)}; run the same command again to write it")
        )
