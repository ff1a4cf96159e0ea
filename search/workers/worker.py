"""One trial in a worker: combine weights, evaluate, take gradient steps."""

from __future__ import annotations

import gc
import math
import os
import socket
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators import Candidate, Measurement
from mergesearch.evaluators.evaluator_base import with_head
from mergesearch.merging import NonFiniteError, Recipe
from mergesearch.merging.extensions.references import find, give, is_reference
from mergesearch.merging.extensions.used_plugins import demand
from mergesearch.merging.tensors.accelerator import empty_cache
from mergesearch.merging.tensors.device_errors import DeviceError, device_error
from mergesearch.search.fidelity.rules import NeverStop, StagedMeasurement, measure_in_stages
from mergesearch.search.redact import redact
from mergesearch.search.workers.card_copy import CardCopy
from mergesearch.search.workers.devices import current_device
from mergesearch.search.workers.from_sources import write_from_sources
from mergesearch.search.workers.gradient_steps import (
    GradientResult,
    GradientSteps,
    take_gradient_steps,
)
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.lower_blocks import lower_blocks
from mergesearch.search.workers.messages import NODE_CACHE, Failure, Outcome, Task, WorkerSpec
from mergesearch.search.workers.node_cache import node_cache
from mergesearch.search.workers.other_shapes import OtherShapes
from mergesearch.search.workers.resident_model import (
    import_libraries,
    mixture_writer,
    own_heads,
    recalibration_of,
    resident_model,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mergesearch.evaluators import Batch
    from mergesearch.evaluators.base import ItemSubset
    from mergesearch.evaluators.objectives import References
    from mergesearch.merging.mixture.resident import MixtureWriter
    from mergesearch.merging.resident.merged_model import MergedModel
    from mergesearch.merging.resident.recalibration import Recalibration
    from mergesearch.search.workers.lower_blocks import LowerBlocks


#: What helps where even one item at a time is too much.
MEMORY_ADVICE = (
    "not even one item fits at a time: shorten the items, take a smaller model, or give each "
    "worker more memory (workers.gpus, workers.per_gpu)"
)


@dataclass(frozen=True)
class _Attempt:
    """What one attempt at a task came to."""

    staged: StagedMeasurement | None = None
    gradient_result: GradientResult | None = None
    failure: Failure | None = None
    device_error: DeviceError | None = None


class Worker:
    """Runs tasks one after the other on a resident model and its evaluators.

    Everything is built from the spec, so a restarted worker is the same worker.

    Args:
        spec: What to build.
        loading: Told how far the worker is with that.
        copy: Base and rows that lie on its card already.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        loading: LoadingReporter | None = None,
        copy: CardCopy | None = None,
    ) -> None:
        from mergesearch.evaluators.spec.evaluators import (
            build_evaluator,
            hands_weights_out,
            parse_evaluators,
        )

        if spec.arenas == NODE_CACHE:
            spec = replace(spec, arenas=str(node_cache()))
        give(spec.objects)
        demand(spec.plugins, f"workers on {socket.gethostname()}")
        if is_reference(spec.template.operator):
            find(spec.template.operator, "operator.name")
        self._spec = spec
        sections = parse_evaluators(spec.evaluators)
        self._evaluator = build_evaluator(sections, Path(), spec.lend)
        self._hands_weights_out = hands_weights_out(sections)
        self._batch_size: int | None = None  # where memory made it smaller than the study says
        self._broken: Failure | None = None  # why the device can be used no more
        loading = loading or LoadingReporter()
        loading.begin("reading the items")
        if self._evaluator.model_class is not None:
            import_libraries(spec.device)
        self._evaluator.open()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._names = [objective.name for objective in self._evaluator.objectives]
        self._merged: MergedModel | None = None
        self._recalibration: Recalibration | None = None
        self._mixture: MixtureWriter | None = None
        self._other: OtherShapes | None = None
        self._lower: LowerBlocks | None = None
        if self._evaluator.model_class is not None:
            self._mixture = mixture_writer(spec, loading)  # before the model takes its memory
            heads = self._evaluator.use_heads(own_heads(spec))
            self._merged = resident_model(spec, self._evaluator.model_class, loading, copy, heads)
            self._recalibration = recalibration_of(spec)
            self._other = OtherShapes(spec, self._evaluator.model_class)
            if self._mixture is not None:
                self._mixture.attach(self._merged)
        if spec.space is not None and self._merged is not None:
            self._merged.enable_gradient()
        if self._merged is not None and self._recalibration is None:
            self._lower = lower_blocks(spec, self._evaluator, self._merged)
        resident = None if self._merged is None else self._merged.model
        self._device = current_device(resident)  # without a model, nothing is computed here

    def run(self, task: Task) -> Outcome:
        """Run a task; an exception becomes the failure of its outcome.

        A task that runs out of memory is repeated with half the batch, which stays halved. Once the
        device is broken, tasks are handed back untried.
        """
        if self._broken is not None:
            return Outcome(task.id, None, self._broken, worker=self._name, device_broken=True)
        started = time.perf_counter()
        cpu = time.process_time()
        seconds = {"merge": 0.0, "evaluate": 0.0}
        attempt = self._attempt(task, seconds)
        while attempt.device_error == "memory" and self._has_smaller_batch():
            attempt = self._attempt(task, seconds)
        failure = attempt.failure
        broken = attempt.device_error == "broken"
        if broken and self._spec.device != "cpu":  # else a program of the evaluator has met it
            self._broken = failure
        elif failure is not None and attempt.device_error == "memory":
            failure = replace(failure, message=f"{failure.message}; {MEMORY_ADVICE}")
        staged = attempt.staged
        wall = time.perf_counter() - started
        seconds["overhead"] = wall - sum(seconds.values())
        share = (time.process_time() - cpu) / max(wall, 1e-9)
        return Outcome(
            task=task.id,
            measurement=None if staged is None or failure is not None else staged.measurement,
            failure=failure,
            seconds=seconds,
            worker=self._name,
            gradient_result=attempt.gradient_result,
            rungs={} if staged is None else staged.rungs,
            stopped=None if staged is None else staged.stopped,
            cpu_share=share,
            batch_size=self._batch_size,
            device_broken=broken,
            device=self._device,
        )

    def routed(self, recipe: Recipe) -> Any:
        """The merge of a recipe that depends on its input; valid until the next task."""
        from mergesearch.evaluators.routing.routed import RoutedEvaluator

        assert isinstance(self._evaluator, RoutedEvaluator)
        model = self._combine(recipe, {"merge": 0.0})
        heads = {} if self._merged is None else self._merged.heads
        return self._evaluator.routed(Candidate(recipe, model, self._merged, heads=heads))

    def _attempt(self, task: Task, seconds: dict[str, float]) -> _Attempt:
        """Measure a task and take its gradient steps once."""
        staged = None
        try:
            staged = self._measure(task, seconds)
            steps = task.gradient_steps
            if steps is None:
                return _Attempt(staged)
            return _Attempt(staged, self._take_gradient_steps(task, steps, seconds))
        except NonFiniteError as error:
            return _Attempt(staged, failure=Failure("infeasible", str(error)))
        except Exception as error:
            # No exception is kept: its frames hold what filled the memory.
            return _Attempt(staged, failure=failure_of(error), device_error=device_error(error))

    def _has_smaller_batch(self) -> bool:
        """Halve the evaluator's batch, if it has one, and free what the last attempt left."""
        smaller = self._evaluator.halve_batch()
        if smaller is None:
            return False
        self._batch_size = smaller
        _free_memory()
        return True

    def _measure(self, task: Task, seconds: dict[str, float]) -> StagedMeasurement:
        """Evaluate the task's merge, in the stages of its early stop rule; empty for no items."""
        if task.items == 0:
            return StagedMeasurement(Measurement({}), {}, None)
        model = self._combine(task.recipe, seconds, exact=task.split != "search")
        candidate = self._candidate(task.recipe, model, task.references)

        def evaluate(items: ItemSubset) -> Measurement:
            measured = self._evaluator.evaluate(candidate, task.split, items)
            self._check_finite(measured, task.references is not None)
            return measured

        before = time.perf_counter()
        try:
            rule = task.early_stop_rule
            if rule is None or task.items is not None:
                rule = NeverStop(())
            with nullcontext() if self._lower is None else self._lower.used(task):
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
            result = self._evaluator.backward(self._candidate(recipe, model), batch, config.weights)
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

    def _candidate(
        self, recipe: Recipe, model: Any, references: References | None = None
    ) -> Candidate:
        """What the evaluator scores: the merge, with the head that it names, and all heads."""
        merged = self._merged_for(recipe)
        heads = {} if merged is None else merged.heads
        candidate = Candidate(recipe, model, merged, references, heads=heads)
        return with_head(candidate, self._evaluator)

    def _combine(self, recipe: Recipe, seconds: dict[str, float], *, exact: bool = False) -> Any:
        """The resident model with the recipe's weights, or None for problems without a model.

        Where rows are approximate, ``exact`` merges from the sources instead.
        """
        if self._merged is None:
            return None
        before = time.perf_counter()
        try:
            merged = self._merged_for(recipe) or self._merged
            self._write(merged, recipe, exact)
            if self._recalibration is not None:
                self._recalibration.apply(merged.model)
        finally:
            seconds["merge"] += time.perf_counter() - before
        return merged.model

    def _merged_for(self, recipe: Recipe) -> MergedModel | None:
        """The resident model of the shapes that a recipe has."""
        if self._merged is None or self._other is None or self._other.fits_own(recipe):
            return self._merged
        return self._other.merged(recipe)

    def _write(self, merged: MergedModel, recipe: Recipe, exact: bool) -> None:
        """Write a merge into the resident model.

        An anchor of another operator has no arenas and is merged from its sources, and so is what
        must be exact where the arenas are not.
        """
        from mergesearch.merging.resident.encodings.table import rows_are_exact

        if self._mixture is not None:
            self._mixture.write(merged, recipe)
            return
        resident = recipe.basis_key == self._spec.template.basis_key or (
            self._other is not None and self._other.holds(recipe)
        )
        if resident and (not exact or rows_are_exact(self._spec.rows)):
            if self._hands_weights_out:
                merged.forget()
            merged.write(recipe.field, recipe.bits)
            return
        write_from_sources(merged, recipe, self._spec.arenas)

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


def failure_of(error: Exception) -> Failure:
    """What is recorded of an exception.

    The record is kept, shown and sent, so secrets in an evaluator's error stay out of it.
    """
    text = f"{type(error).__name__}: {error}"
    return Failure("error", redact(text), redact("".join(traceback.format_exception(error))))


def _free_memory() -> None:
    """Give what torch keeps for later allocations back to the device."""
    gc.collect()  # graphs and modules hold each other
    empty_cache()
