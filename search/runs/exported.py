"""Export of trials that are no single checkpoint, and a second score of exported models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.evaluators import Candidate, Measurement, Split
from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.search.fidelity.rules import NeverStop, measure_in_stages
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.worker import Worker


def rescore(run: Run, record: TrialRecord, exported: Path) -> tuple[Split, Measurement, bool]:
    """Load an exported model and score it on the items that the record has scores for.

    Returns:
        The split, the new measurement, and whether its values equal the recorded ones exactly.
    """
    import torch

    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.routing.bundle import load

    # As in the worker: other threads or another device may round differently.
    spec = worker_spec(run.plan, run.folder)
    torch.set_num_threads(spec.threads)
    evaluator = build_evaluator(run.plan.spec.evaluators, Path())
    evaluator.open()
    model: Any = None
    if record.recipe.routing:
        model = load(exported)
    elif evaluator.model_class is not None:
        model = load_model(str(exported), evaluator.model_class)
    if model is not None and torch.cuda.is_available():
        model = model.to(spec.device)
    verdict = run.verdict
    test_scores = {} if verdict is None else verdict.scores.get("test", {})
    split: Split = "test" if record.number in test_scores else "search"
    recorded: Mapping[str, float] = (
        test_scores[record.number].values if split == "test" else record.values
    )
    candidate = Candidate(record.recipe, model, references=run.log.results.references(split))
    # As it was evaluated, in the same stages: batches of another size may round differently.
    stages = sorted(record.rungs) if split == "search" else ()
    measurement = measure_in_stages(
        lambda items: evaluator.evaluate(candidate, split, items), NeverStop(tuple(stages))
    ).measurement
    return split, measurement, dict(measurement.values) == dict(recorded)


def export_bundle(
    run: Run,
    record: TrialRecord,
    out: Path,
    *,
    facts: Mapping[str, str],
    overwrite: bool,
    threads: int,
) -> None:
    """Write a trial whose merge depends on its input.

    :func:`mergesearch.merging.routing.bundle.load` reads it.
    """
    from mergesearch.merging.routing.bundle import write_bundle

    assert run.plan.evaluator.model_class is not None
    routed = Worker(worker_spec(run.plan, run.folder)).routed(record.recipe)
    write_bundle(
        record.recipe,
        routed,
        out,
        model_class=run.plan.evaluator.model_class,
        facts=facts,
        overwrite=overwrite,
        threads=threads,
    )
