"""Messages between driver and workers: tasks, outcomes, and what a worker is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators import Measurement, Split
from mergesearch.merging import Recipe
from mergesearch.merging.extensions.used_plugins import UsedPlugin
from mergesearch.merging.kernels.spans import RowsSetting
from mergesearch.search.fidelity.rules import EarlyStopRule
from mergesearch.search.workers.devices import Device
from mergesearch.search.workers.gradient_steps import GradientResult, GradientSteps

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mergesearch.evaluators.objectives import References
    from mergesearch.spaces import DifferentiableSpace


#: Where nodes of a cluster keep prepared weights: on a disk of their own, readable by their user
#: alone.
NODE_CACHE = "node"


#: Why a trial has no values: weights or scores that are not finite, an exception, or a worker that
#: died twice.
FailureKind = Literal["infeasible", "error", "lost"]


@dataclass(frozen=True)
class Task:
    """A unit of work for a backend.

    Attributes:
        id: Chosen by the driver.
        recipe: The merge.
        split: Which items.
        items: Number of items to evaluate on, the first ones; None: all, 0: none.
        point: Position of the recipe in the space ``(dim,)``, for gradient steps.
        gradient_steps: Gradients to take and follow after the evaluation.
        references: Values of other models that objectives are relative to; None while those are
            measured.
        early_stop_rule: Rule that may stop the evaluation early.
    """

    id: str
    recipe: Recipe
    split: Split
    items: int | None = None
    point: npt.NDArray[np.float64] | None = None
    gradient_steps: GradientSteps | None = None
    references: References | None = field(default_factory=dict)
    early_stop_rule: EarlyStopRule | None = None


@dataclass(frozen=True)
class Failure:
    """The reason why a task has no measurement; ``detail`` is the traceback of an error."""

    kind: FailureKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a task: a measurement or a failure.

    Attributes:
        task: Id of the task.
        measurement: On all items of the task, or on those until a rule stopped it.
        failure: The reason why there is no measurement.
        seconds: Time of ``merge``, ``evaluate``, ``descend`` (gradient steps) and ``overhead``.
        worker: Host and process that ran it.
        gradient_result: The result of its gradient steps.
        rungs: Items -> values, at every stage of the early stop rule.
        stopped: Number of items after which a rule stopped it; None where none did.
        cpu_share: CPU time of the worker over wall time; above 1 with several threads.
        batch_size: Items of a forward pass, where memory ran out and made them fewer; else None.
        device_broken: Whether the worker can use its device no more: the failure is that of the
            device, and the task is to run elsewhere.
        device: What the worker computes on.
        copy_lost: Whether the weights that the worker shares with others of its card were lost
            meanwhile: nothing that it computed counts, and the task is to run again.
    """

    task: str
    measurement: Measurement | None
    failure: Failure | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    gradient_result: GradientResult | None = None
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    stopped: int | None = None
    cpu_share: float | None = None
    batch_size: int | None = None
    device_broken: bool = False
    device: Device | None = None
    copy_lost: bool = False


@dataclass(frozen=True)
class Notice:
    """Something that a backend tells its driver.

    Attributes:
        kind: ``workers``: where they are, started or lost; ``loading``: how far those are that
            load; ``set aside``: a card that is used no more.
        text: A message, or for ``set aside`` the card and the reason.
        done, total: Progress of what is loaded; 0 where it is not known.
    """

    kind: Literal["workers", "loading", "set aside"]
    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker is built from; small, and sent once.

    Attributes:
        template: The study's recipe; every task has its sources and layout, and nearly every task
            its operator.
        evaluators: The ``evaluators`` section of the resolved study, with absolute paths.
        arenas: Folder of the arena files that workers of a host share; :data:`NODE_CACHE` for the
            host's own.
        threads: Threads for merging and evaluation on CPU.
        device: ``cpu``, or ``accelerator`` for whichever the worker's machine has.
        shards: GPUs over which the model is spread.
        space: Meaning of points, for strategies that follow gradients.
        rows: How rows are kept in memory.
        prepare: Where decompositions of preparing run.
        objects: Name -> function or class that a program gave, which no worker could import.
        plugins: The plug-ins that the study uses; a worker needs them in the same versions.
        lend: Share of the validation items that the search uses instead; None: none of them.
        hidden_states: Bytes for hidden states of lower blocks that trials share; 0: none are kept.
    """

    template: Recipe
    evaluators: tuple[Mapping[str, Any], ...]
    arenas: str
    threads: int = 1
    device: str = "cpu"
    shards: int = 1
    space: DifferentiableSpace | None = None
    rows: RowsSetting = "auto"
    prepare: Literal["cpu", "card"] = "cpu"
    objects: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[UsedPlugin, ...] = ()
    lend: float | None = None
    hidden_states: int = 0
