"""What a run knows about a trial's model, for its model card."""

from __future__ import annotations

from mergesearch.evaluators import SPLITS
from mergesearch.merging import Layout, Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.about import About, Result
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.recipe_file import recipe_text, shorthand_of
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.report.data import TRANSDUCTIVE
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.runs.opened import Run
from mergesearch.search.spec.comparison import evaluation_digest
from mergesearch.spaces.groups import groupings_by_name

#: transformers auto class -> the hub's name of the task.
TASKS = {
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskGeneration": "mask-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}


def about_trial(run: Run, record: TrialRecord) -> About:
    """Held-out results of a trial, its recipe as one would write it, and how to export it again."""
    scores = {} if run.verdict is None else run.verdict.scores.get("test", {})
    score = scores.get(record.number)
    dataset = f"held-out items of study {run.plan.spec.name}"
    results = (
        ()
        if score is None
        else tuple(
            Result(name, value, score.errors.get(name), dataset)
            for name, value in score.values.items()
        )
    )
    layout = run.plan.layout_of(record.recipe)
    assert layout is not None
    return About(
        results,
        TASKS.get(run.plan.evaluator.model_class or "", ""),
        _written(record.recipe, layout),
        (
            "# or from the run, with its scores:",
            f"mergesearch export RUN --trial {record.number} --out merged-model",
        ),
        settings=evaluation_digest(run.plan.spec),
    )


def about_recipe(recipe: Recipe) -> About:
    """A recipe as one would write it, where its layout is that of its base."""
    layout = layout_of(open_checkpoint(recipe.base.path))
    return About(recipe=_written(recipe, layout) if layout.digest == recipe.layout else "")


def _written(recipe: Recipe, layout: Layout) -> str:
    written = shorthand_of(recipe, layout, groupings_by_name(layout))
    return "" if written is None else recipe_text(written)


def facts_of(run: Run, number: int) -> dict[str, str]:
    """Scores for the model card, and what they were measured with."""
    record = run.log.records[number]
    scores = {} if run.verdict is None else run.verdict.scores
    facts = {"study": run.plan.spec.name, "trial": str(number)}
    for split in SPLITS:
        searched = Score(record.values, record.errors)
        score = searched if split == "search" else scores.get(split, {}).get(number)
        if score is None:
            continue
        for name, value in score.values.items():
            spread = f" ± {score.errors[name]:.4g}" if name in score.errors else ""
            facts[f"{name}, {split} items"] = f"{value:.4g}{spread}"
    facts |= _gains(run, number)
    unrelated = run.log.get_attr("lineage warnings")
    facts |= {"lineage": "; ".join(unrelated)} if unrelated else {}
    facts["evaluation settings"] = evaluation_digest(run.plan.spec)
    if run.plan.evaluator.transductive:
        facts["evaluation"] = TRANSDUCTIVE
    return facts


def _gains(run: Run, number: int) -> dict[str, str]:
    """What the winner gains over all anchors, for its model card; nothing for other trials."""
    if run.verdict is None or number != run.verdict.winner:
        return {}
    data = run.report_data()
    return {
        f"{gain.objective}, gain over the best of {gain.anchors} anchors": (
            f"{gain.low:+.4g} to {gain.high:+.4g} (95 % simultaneous interval, test items)"
        )
        for gain in gains(data, anchor_intervals(data))
    }
