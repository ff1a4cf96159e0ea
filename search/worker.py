"""One trial: combine, evaluate, measure. Also the messages between driver and workers."""

from __future__ import annotations

import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluators import Candidate, Measurement, Split
from merging import InputError, NonFiniteError, Recipe
from search.descent import Descended, Descent, descend
from search.fidelity import NeverStop, Watch, Watched, measure_in_stages
from search.redact import redact

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from evaluators import Batch
    from evaluators.base import Part
    from evaluators.objectives import References
    from merging.arena import Arenas
    from merging.binding import MergedModel
    from merging.recalibration import Recalibration
    from spaces import DifferentiableSpace

#: Where nodes of a cluster keep prepared weights: on a disk of their own, readable by their user alone.
NODE_CACHE = "node"
#: Why a trial has no values: weights or scores not finite; an exception; the worker died (twice).
FailureKind = Literal["infeasible", "error", "lost"]


@dataclass(frozen=True)
class Task:
    """A unit of work for a backend.

    Attributes:
        id: Chosen by the driver.
        recipe: The merge.
        split: Which items.
        items: The first so many of them; None: all, 0: none.
        references: Values of other models that objectives are relative to; None while those are measured.
        watch: Rule that may stop the evaluation early.
        point: Where the recipe is in the space ``(dim,)``, for a descent.
        descent: Gradients to take and follow after the evaluation.
    """

    id: str
    recipe: Recipe
    split: Split
    items: int | None = None
    point: npt.NDArray[np.float64] | None = None
    descent: Descent | None = None
    references: References | None = field(default_factory=dict)
    watch: Watch | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no measurement; ``detail`` is the traceback for errors."""

    kind: FailureKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came back for a task: a measurement and its descent's end, or a failure, and where the seconds went.

    Attributes:
        task: Id of the task.
        measurement: On all items that were asked for, or on those until it was stopped.
        failure: Why there is none.
        seconds: Of ``merge``, ``evaluate``, ``descend``, ``overhead``.
        worker: Host and process that ran it.
        descended: What came of its descent.
        rungs: Items -> values, at every stage of a watched evaluation.
        stopped: Items until a rule stopped it; None where none did.
        cpu_share: CPU time of the worker over wall time; above 1 with several threads.
    """

    task: str
    measurement: Measurement | None
    failure: Failure | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    descended: Descended | None = None
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    stopped: int | None = None
    cpu_share: float | None = None


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from; small, and travels once.

    Attributes:
        template: The study's recipe; its sources and layout are those of every task, its operator that of nearly all.
        evaluators: The ``evaluators`` section of the resolved study, with absolute paths.
        arenas: Folder of the shared arena files of this host; :data:`NODE_CACHE` for the host's own.
        threads: Threads for merging and evaluation on CPU.
        device: ``cpu`` or ``cuda``.
        shards: GPUs over which the model is spread.
        space: What points mean, for strategies that follow gradients.
    """

    template: Recipe
    evaluators: tuple[Mapping[str, Any], ...]
    arenas: str
    threads: int = 1
    device: str = "cpu"
    shards: int = 1
    space: DifferentiableSpace | None = None


class Worker:
    """A resident model and the evaluators; runs tasks one after the other.

    Everything is re-attached from the spec, so a restarted worker is the same worker.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        from evaluators.spec import build_evaluator, parse_evaluators

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
        """Combine, evaluate, measure, descend. Never raises: what goes wrong becomes the outcome's failure."""
        started, cpu = time.perf_counter(), time.process_time()
        seconds = {"merge": 0.0, "evaluate": 0.0}
        measurement, descended, failure = None, None, None
        rungs: Mapping[int, Mapping[str, float]] = {}
        stopped: int | None = None
        try:
            watched = self._measure(task, seconds)
            measurement, rungs, stopped = watched.measurement, watched.rungs, watched.stopped
            if task.descent is not None:
                descended = self._descend(task, task.descent, seconds)
        except NonFiniteError as error:
            measurement, failure = None, Failure("infeasible", str(error))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            # The record is kept, shown and sent: what an evaluator's error says of its surroundings is not for it.
            measurement, failure = None, Failure("error", redact(text), redact(traceback.format_exc()))
        wall = time.perf_counter() - started
        seconds["overhead"] = wall - sum(seconds.values())
        share = (time.process_time() - cpu) / max(wall, 1e-9)
        return Outcome(task.id, measurement, failure, seconds, self._name, descended, rungs, stopped, share)

    def routed(self, recipe: Recipe) -> Any:
        """The merge of a recipe that depends on its input; of use until the next task."""
        from evaluators.routed import RoutedEvaluator

        assert isinstance(self._evaluator, RoutedEvaluator)
        model = self._combine(recipe, {"merge": 0.0})
        return self._evaluator.routed(Candidate(recipe, model, self._merged))

    def _measure(self, task: Task, seconds: dict[str, float]) -> Watched:
        """What the evaluators say of the task's merge; nothing where no item is asked for."""
        if task.items == 0:
            return Watched(Measurement({}), {}, None)
        model = self._combine(task.recipe, seconds)
        candidate = Candidate(task.recipe, model, self._merged, task.references)

        def evaluate(items: Part) -> Measurement:
            measured = self._evaluator.evaluate(candidate, task.split, items)
            self._check_finite(measured, task.references is not None)
            return measured

        before = time.perf_counter()
        try:
            watch = NeverStop(()) if task.watch is None or task.items is not None else task.watch
            return measure_in_stages(lambda items: evaluate(task.items if items is None else items), watch)
        finally:
            seconds["evaluate"] = time.perf_counter() - before

    def _descend(self, task: Task, descent: Descent, seconds: dict[str, float]) -> Descended:
        """Walk on from the task's point; every step merges, runs backwards, and takes the coefficients' gradient."""
        space, rule = self._spec.space, descent.rule
        assert space is not None
        assert task.point is not None
        before, merging = time.perf_counter(), seconds["merge"]

        def slope_at(point: npt.NDArray[np.float64], batch: Batch) -> tuple[float, npt.NDArray[np.float64]]:
            recipe = space.decode(point)
            model = self._combine(recipe, seconds)
            if self._merged is not None:
                self._merged.clear_gradient()
            slope = self._evaluator.backward(Candidate(recipe, model), batch, rule.weights)
            found = slope.field
            if found is None:
                assert self._merged is not None
                measure = self._merged.gradient if rule.measure == "gradient" else self._merged.cosines
                found = measure(recipe.field)
            return slope.loss, space.pull_back(point, found)

        try:
            return descend(descent, task.point, slope_at)
        finally:
            merged = seconds["merge"] - merging
            seconds["descend"] = time.perf_counter() - before - merged

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
        """Merge into the resident model; an anchor of another operator is merged from its sources, without arenas."""
        from merging.family import open_family
        from merging.in_memory import merge_stream
        from merging.memo import Memo

        if recipe.basis_key == self._spec.template.basis_key:
            merged.write(recipe.field)
            return
        family = open_family(recipe, Memo(Path(self._spec.arenas) / "shared"))
        base, experts, layout = family.base, family.experts, family.layout
        tensors = merge_stream(base, experts, recipe.operator, recipe.options, recipe.field, layout, family.treatment)
        merged.write_tensors(tensors)

    def _check_finite(self, measurement: Measurement, whole: bool) -> None:
        """Without references, objectives that need some are not known; the means must be finite all the same."""
        for name in self._names:
            if not math.isfinite(measurement.values[name]) and (whole or not measurement.means):
                raise NonFiniteError(f"objective {name!r}")


def node_cache_folder() -> Path:
    """This host's folder for prepared weights, below its folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"mergesearch-{os.getuid()}" / "arenas"


def node_cache() -> Path:
    """:func:`node_cache_folder`, made where it is missing.

    Raises:
        InputError: If somebody else owns it: what lies there is taken for this study's own weights.
    """
    path = node_cache_folder()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner, mode = path.parent.stat().st_uid, path.parent.stat().st_mode & 0o077
    if owner != os.getuid() or mode:
        raise InputError(
            f"workers.cache: expected {path.parent} to be this user's alone, found owner {owner} and mode {mode:o} for "
            "others; remove it or set workers.cache"
        )
    path.mkdir(exist_ok=True)
    return path


def _recalibration(spec: WorkerSpec) -> Recalibration | None:
    from merging.family import open_family
    from merging.recalibration import open_recalibration

    return open_recalibration(open_family(spec.template))


def _resident_model(spec: WorkerSpec, model_class: str) -> MergedModel:
    import torch

    from merging.arena import open_arenas
    from merging.binding import MergedModel, load_model
    from merging.export import folder_of_base
    from merging.family import open_family

    torch.set_num_threads(spec.threads)
    arenas = open_arenas(spec.template, Path(spec.arenas), threads=spec.threads)
    with folder_of_base(open_family(spec.template), Path(spec.arenas)) as folder:
        model = load_model(folder, model_class)
        if spec.shards > 1:
            return _sharded_model(spec, model, load_model(folder, model_class), arenas)
    return MergedModel(model, arenas, threads=spec.threads, device=spec.device)


def _sharded_model(spec: WorkerSpec, host: Any, model: Any, arenas: Arenas) -> MergedModel:
    import torch

    from merging.sharding import ShardedModel, dispatch

    # Ray shows a worker its own GPUs only.
    devices = list(range(min(torch.cuda.device_count(), spec.shards)))
    return ShardedModel(host, dispatch(model, devices), arenas, threads=spec.threads)
