"""One trial in a worker: combine weights, evaluate, take gradient steps."""

from __future__ import annotations

import math
import os
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators import Candidate, Measurement
from mergesearch.merging import NonFiniteError, Recipe
from mergesearch.search.fidelity.rules import NeverStop, StagedMeasurement, measure_in_stages
from mergesearch.search.redact import redact
from mergesearch.search.workers.gradient_steps import (
    GradientResult,
    GradientSteps,
    take_gradient_steps,
)
from mergesearch.search.workers.messages import NODE_CACHE, Failure, Outcome, Task, WorkerSpec
from mergesearch.search.workers.node_cache import node_cache

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mergesearch.evaluators import Batch
    from mergesearch.evaluators.base import ItemSubset
    from mergesearch.merging.resident.arena import Arenas
    from mergesearch.merging.resident.merged_model import MergedModel
    from mergesearch.merging.resident.recalibration import Recalibration


class Worker:
    """Runs tasks one after the other on a resident model and its evaluators.

    Everything is built from the spec, so a restarted worker is the same worker.

    Args:
        spec: What to build.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators

        if spec.arenas == NODE_CACHE:
            spec = replace(spec, arenas=str(node_cache()))
        self._spec = spec
        self._evaluator = build_evaluator(parse_evaluators(spec.evaluators), Path())
        self._evaluator.open()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._names = [objective.name for objective in self._evaluator.objectives]
        self._merged: MergedModel | None = None
        self._recalibration: Recalibration | None = None
        if self._evaluator.model_class is not None:
            self._merged = _resident_model(spec, self._evaluator.model_class)
            self._recalibration = _recalibration(spec)
        if spec.space is not None and self._merged is not None:
            self._merged.enable_gradient()

    def run(self, task: Task) -> Outcome:
        """Run a task; an exception becomes the failure of its outcome."""
        started = time.perf_counter()
        cpu = time.process_time()
        seconds = {"merge": 0.0, "evaluate": 0.0}
        measurement = None
        gradient_result = None
        failure = None
        rungs: Mapping[int, Mapping[str, float]] = {}
        stopped: int | None = None
        try:
            staged = self._measure(task, seconds)
            measurement = staged.measurement
            rungs = staged.rungs
            stopped = staged.stopped
            if task.gradient_steps is not None:
                gradient_result = self._take_gradient_steps(task, task.gradient_steps, seconds)
        except NonFiniteError as error:
            measurement = None
            failure = Failure("infeasible", str(error))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            # The record is kept, shown and sent, so secrets in an evaluator's error stay out of it.
            measurement = None
            failure = Failure("error", redact(text), redact(traceback.format_exc()))
        wall = time.perf_counter() - started
        seconds["overhead"] = wall - sum(seconds.values())
        share = (time.process_time() - cpu) / max(wall, 1e-9)
        return Outcome(
            task=task.id,
            measurement=measurement,
            failure=failure,
            seconds=seconds,
            worker=self._name,
            gradient_result=gradient_result,
            rungs=rungs,
            stopped=stopped,
            cpu_share=share,
        )

    def routed(self, recipe: Recipe) -> Any:
        """The merge of a recipe that depends on its input; valid until the next task."""
        from mergesearch.evaluators.routing.routed import RoutedEvaluator

        assert isinstance(self._evaluator, RoutedEvaluator)
        model = self._combine(recipe, {"merge": 0.0})
        return self._evaluator.routed(Candidate(recipe, model, self._merged))

    def _measure(self, task: Task, seconds: dict[str, float]) -> StagedMeasurement:
        """Evaluate the task's merge, in the stages of its early stop rule; empty for no items."""
        if task.items == 0:
            return StagedMeasurement(Measurement({}), {}, None)
        model = self._combine(task.recipe, seconds)
        candidate = Candidate(task.recipe, model, self._merged, task.references)

        def evaluate(items: ItemSubset) -> Measurement:
            measured = self._evaluator.evaluate(candidate, task.split, items)
            self._check_finite(measured, task.references is not None)
            return measured

        before = time.perf_counter()
        try:
            rule = task.early_stop_rule
            if rule is None or task.items is not None:
                rule = NeverStop(())
            return measure_in_stages(
                lambda items: evaluate(task.items if items is None else items), rule
            )
        finally:
            seconds["evaluate"] = time.perf_counter() - before

    def _take_gradient_steps(
        self, task: Task, gradient_steps: GradientSteps, seconds: dict[str, float]
    ) -> GradientResult:
        """Take gradient steps from the task's point.

        Every step merges, runs backwards, and takes the gradient of the coefficients.
        """
        space = self._spec.space
        config = gradient_steps.config
        assert space is not None
        assert task.point is not None
        before = time.perf_counter()
        merged_before = seconds["merge"]

        def loss_and_gradient_at(
            point: npt.NDArray[np.float64], batch: Batch
        ) -> tuple[float, npt.NDArray[np.float64]]:
            recipe = space.decode(point)
            model = self._combine(recipe, seconds)
            if self._merged is not None:
                self._merged.clear_gradient()
            result = self._evaluator.backward(Candidate(recipe, model), batch, config.weights)
            gradient = result.field
            if gradient is None:
                assert self._merged is not None
                measure = (
                    self._merged.gradient if config.measure == "gradient" else self._merged.cosines
                )
                gradient = measure(recipe.field)
            return result.loss, space.pull_back(point, gradient)

        try:
            return take_gradient_steps(gradient_steps, task.point, loss_and_gradient_at)
        finally:
            merging = seconds["merge"] - merged_before
            seconds["descend"] = time.perf_counter() - before - merging

    def _combine(self, recipe: Recipe, seconds: dict[str, float]) -> Any:
        """The resident model with the recipe's weights, or None for problems without a model."""
        if self._merged is None:
            return None
        before = time.perf_counter()
        try:
            self._write(self._merged, recipe)
            if self._recalibration is not None:
                self._recalibration.apply(self._merged.model)
        finally:
            seconds["merge"] += time.perf_counter() - before
        return self._merged.model

    def _write(self, merged: MergedModel, recipe: Recipe) -> None:
        """Write a merge into the resident model.

        An anchor of another operator has no arenas and is merged from its sources.
        """
        from mergesearch.merging.family.family import open_family
        from mergesearch.merging.in_memory import merge_stream
        from mergesearch.merging.tensors.memo import Memo

        if recipe.basis_key == self._spec.template.basis_key:
            merged.write(recipe.field)
            return
        family = open_family(recipe, Memo(Path(self._spec.arenas) / "shared"))
        base = family.base
        experts = family.experts
        layout = family.layout
        tensors = merge_stream(
            base, experts, recipe.operator, recipe.options, recipe.field, layout, family.special
        )
        merged.write_tensors(tensors)

    def _check_finite(self, measurement: Measurement, whole: bool) -> None:
        """Refuse values that are not finite.

        Objectives that are relative to references have no finite value while those are measured
        (``whole`` is False); their means serve instead.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        for name in self._names:
            if not math.isfinite(measurement.values[name]) and (whole or not measurement.means):
                raise NonFiniteError(f"objective {name!r}")


def _recalibration(spec: WorkerSpec) -> Recalibration | None:
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.resident.recalibration import open_recalibration

    return open_recalibration(open_family(spec.template))


def _resident_model(spec: WorkerSpec, model_class: str) -> MergedModel:
    import torch

    from mergesearch.merging.export.folder import folder_of_base
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.resident.arena import open_arenas
    from mergesearch.merging.resident.merged_model import MergedModel

    torch.set_num_threads(spec.threads)
    arenas = open_arenas(spec.template, Path(spec.arenas), threads=spec.threads)
    with folder_of_base(open_family(spec.template), Path(spec.arenas)) as folder:
        model = load_model(folder, model_class)
        if spec.shards > 1:
            return _sharded_model(spec, model, load_model(folder, model_class), arenas)
    return MergedModel(model, arenas, threads=spec.threads, device=spec.device)


def _sharded_model(spec: WorkerSpec, host: Any, model: Any, arenas: Arenas) -> MergedModel:
    import torch

    from mergesearch.merging.resident.sharded_model import ShardedModel, dispatch

    # Ray shows a worker its own GPUs only.
    devices = list(range(min(torch.cuda.device_count(), spec.shards)))
    return ShardedModel(host, dispatch(model, devices), arenas, threads=spec.threads)
