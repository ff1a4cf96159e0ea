"""messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators import Measurement, Split
from mergesearch.merging import Recipe
from mergesearch.search.fidelity.rules import EarlyStopRule
from mergesearch.search.workers.gradient_steps import GradientResult, GradientSteps

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mergesearch.evaluators.objectives import References
    from mergesearch.spaces import DifferentiableSpace


#: Where nodes of a cluster keep prepared weights: on a disk of their own, readable by their user
#: alone.
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
        references: Values of other models that objectives are relative to; None while those are
            measured.
        watch: Rule that may stop the evaluation early.
        point: Where the recipe is in the space ``(dim,)``, for gradient steps.
        gradient_steps: Gradients to take and follow after the evaluation.
    """

    id: str
    recipe: Recipe
    split: Split
    items: int | None = None
    point: npt.NDArray[np.float64] | None = None
    gradient_steps: GradientSteps | None = None
    references: References | None = field(default_factory=dict)
    watch: EarlyStopRule | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no measurement; ``detail`` is the traceback for errors."""

    kind: FailureKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came back for a task: a measurement and the result of its gradient steps, or a failure,
    and where the seconds went.

    Attributes:
        task: Id of the task.
        measurement: On all items that were asked for, or on those until it was stopped.
        failure: Why there is none.
        seconds: Of ``merge``, ``evaluate``, ``descend``, ``overhead``.
        worker: Host and process that ran it.
        gradient_result: The result of its gradient steps.
        rungs: Items -> values, at every stage of a watched evaluation.
        stopped: Items until a rule stopped it; None where none did.
        cpu_share: CPU time of the worker over wall time; above 1 with several threads.
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


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from; small, and travels once.

    Attributes:
        template: The study's recipe; its sources and layout are those of every task, its operator
            that of nearly all.
        evaluators: The ``evaluators`` section of the resolved study, with absolute paths.
        arenas: Folder of the shared arena files of this host; :data:`NODE_CACHE` for the host's
            own.
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
