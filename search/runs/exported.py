"""Export of trials that are no single checkpoint, and a second score of exported models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.evaluators import Candidate, Evaluator, Measurement, Split
from mergesearch.evaluators.compute_settings import fix_compute_settings
from mergesearch.evaluators.evaluator_base import with_head
from mergesearch.evaluators.objectives import References
from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.merging import Recipe
from mergesearch.merging.tensors.accelerator import device_or_cpu
from mergesearch.search.fidelity.rules import NeverStop, measure_in_stages
from mergesearch.search.judging.settled import settled
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.runs.agreement import Agreement, compare_scores
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.devices import Device, current_device
from mergesearch.search.workers.worker import Worker


@dataclass(frozen=True)
class Rescored:
    """The second score of an exported model.

    Attributes:
        split: The items that it was scored on.
        measurement: The score.
        agreement: How it compares with the record.
    """

    split: Split
    measurement: Measurement
    agreement: Agreement


@dataclass(frozen=True)
class Scoring:
    """On what an exported model is scored, and how.

    Attributes:
        split: The items.
        references: Values of the models that objectives are relative to.
        batch_size: Items of a forward pass, where these had to be fewer than the study says.
        stages: Numbers of items after which an early stop rule looked at the values.
        whole: Whether the folder has the one head that all items need.
    """

    split: Split
    references: References
    batch_size: int | None = None
    stages: tuple[int, ...] = ()
    whole: bool = False


def rescore(run: Run, record: TrialRecord, exported: Path, *, whole: bool = False) -> Rescored:
    """Load an exported model and score it on the items that the record has scores for.

    Args:
        run: The run.
        record: The trial.
        exported: Folder of its model.
        whole: Whether the folder has the one head that all items need.
    """
    verdict = run.verdict
    test_scores = {} if verdict is None else verdict.scores.get("test", {})
    split: Split = "test" if record.number in test_scores else "search"
    recorded = (
        test_scores[record.number]
        if split == "test"
        else Score(record.values, record.errors, record.items)
    )
    scoring = Scoring(
        split,
        run.log.results.references(split),
        record.batch_size,
        # As it was evaluated, in the same stages: batches of another size may round differently.
        tuple(sorted(record.rungs)) if split == "search" else (),
        whole,
    )
    measurement, here = score_folder(run.plan, run.folder, record.recipe, exported, scoring)
    measurement = settled(measurement, recorded, run.folder.path, split, record.recipe.digest)
    devices = _devices(run, record, split)
    on_card = run.plan.spec.workers.prepare == "card"
    agreement = compare_scores(recorded, measurement, devices, here, prepared_on_card=on_card)
    return Rescored(split, measurement, agreement)


def score_folder(
    plan: Plan, folder: RunFolder, recipe: Recipe, exported: Path, scoring: Scoring
) -> tuple[Measurement, Device]:
    """Load an exported model and score it as workers of a study do; also the device of that.

    Args:
        plan: The study.
        folder: Its run folder.
        recipe: The merge.
        exported: Folder of its model.
        scoring: On which items, and how.
    """
    import torch

    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.routing.bundle import load

    # As in the worker: other threads or another device may round differently.
    spec = worker_spec(plan, folder)
    torch.set_num_threads(spec.threads)
    fix_compute_settings()
    study = plan.spec
    evaluator = build_evaluator(study.evaluators, Path(), study.selection.lend)
    evaluator.open()
    _take_batches_of(scoring.batch_size, evaluator)
    model: Any = None
    device = device_or_cpu(spec.device)
    own = plan.heads
    used = evaluator.use_heads([] if own is None else [*own.of])
    routed = bool(recipe.routing)  # then it brings the heads itself
    heads = {} if routed else _loaded_heads(exported, used, device, scoring.whole)
    if routed:
        model = load(exported)
    elif heads:
        model = next(iter(heads.values()))
    elif evaluator.model_class is not None:
        model = load_model(str(exported), evaluator.model_class)
    if model is not None and device != "cpu":
        model = model.to(device)
    candidate = Candidate(recipe, model, references=scoring.references, heads=heads)
    if not routed:
        candidate = with_head(candidate, evaluator)
    measurement = measure_in_stages(
        lambda items: evaluator.evaluate(candidate, scoring.split, items),
        NeverStop(scoring.stages),
    ).measurement
    return measurement, current_device(model, device)


def _loaded_heads(
    exported: Path, classes: Mapping[str, str], device: str, whole: bool
) -> dict[str, Any]:
    """An exported merge with each head that its items are scored with."""
    from mergesearch.merging.export.head_models import load_with_head
    from mergesearch.merging.models.loading import load_model

    if whole:
        return {name: load_model(str(exported), kind).to(device) for name, kind in classes.items()}
    return {name: load_with_head(exported, name, kind).to(device) for name, kind in classes.items()}


def _take_batches_of(size: int | None, evaluator: Evaluator) -> None:
    """Halve the batches of an evaluator to those that a trial was evaluated in."""
    while size is not None and (evaluator.halve_batch() or size) > size:
        pass


def _devices(run: Run, record: TrialRecord, split: Split) -> list[Device]:
    """The devices that a score may have been measured on.

    A trial names its worker. A score on test items does not: it may come from any of them.
    """
    recorded = run.folder.devices()
    if split == "search":
        return [recorded[record.worker]] if record.worker in recorded else []
    return list(dict.fromkeys(recorded.values()))


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
