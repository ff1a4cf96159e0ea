"""The section of an evaluator that is a Python function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.base import Evaluator, Objective
from mergesearch.evaluators.data.item_files import SHARES
from mergesearch.evaluators.spec.base import ProgramBoundSpec, metrics_of
from mergesearch.evaluators.spec.data import check_shares
from mergesearch.evaluators.spec.others import ObjectiveSpec, check_some
from mergesearch.evaluators.spec.section import ModelSection
from mergesearch.merging.extensions.references import (
    find_function,
    is_reference,
    located,
    source_digest,
)


class PythonSpec(ModelSection):
    """Objectives that a Python function measures, called in the worker's own process."""

    any_library: ClassVar[bool] = True
    kind: Literal["python"]
    function: str = Key(
        description="module:name or file.py:name, called with the model; may also take split, "
        "items and the inputs."
    )
    objectives: list[ObjectiveSpec] = Key(
        default_factory=lambda: [ObjectiveSpec(name="score", direction="maximize")],
        description="By default one, called score, which is maximised; [] where the function only "
        "guards others by constraints.",
    )
    constraints: list[ProgramBoundSpec] = Key(
        default_factory=list,
        exclude_if=lambda bounds: not bounds,  # older studies have no such key, and their hash
        description="Bounds that merges must keep, on objectives or on other scores.",
    )
    inputs: dict[str, Any] = Key(
        default_factory=dict, description="Further arguments of the function, by name."
    )
    sizes: dict[Literal["search", "validation", "test"], Annotated[int, Key(ge=1)]] | None = Key(
        default=None,
        description="Items of each split, where the function takes split and scores items.",
    )
    divide: tuple[float, float, float] = Key(
        default=SHARES,
        description="Shares of the splits, where the function takes no split and scores items.",
    )
    model: Literal["module", "none"] = Key(
        default="module", description="Hand over the merged model, or the recipe alone."
    )
    model_class: str = Key(
        default="AutoModelForCausalLM",
        description="transformers auto class of the model, or module:name of a function that "
        "builds any torch module.",
    )
    deterministic: bool = Key(
        default=False,
        exclude_if=lambda same: not same,  # older studies have no such key, and their hash
        description="Whether the function scores a merge the same each time; one that was measured "
        "before is then answered from the record.",
    )
    source: dict[str, str] = Key(
        default_factory=dict,
        description="Hashes of the functions' code, which a resumed run must share; found when the "
        "study begins.",
    )

    @property
    def runs_code(self) -> bool:
        """Whether the section runs code, which it always does."""
        return True

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the functions that the section needs."""
        return tuple(self._functions.values())

    @property
    def _functions(self) -> dict[str, str]:
        """Key -> name of each function."""
        builds = self.model == "module" and is_reference(self.model_class)
        return {"function": self.function, **({"model_class": self.model_class} if builds else {})}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        check_some(self.objectives, self.constraints)
        if not is_reference(self.function):
            raise ValueError(
                f"function: expected module:name or file.py:name, received {self.function!r}"
            )
        if self.sizes is not None and set(self.sizes) != {"search", "validation", "test"}:
            raise ValueError(
                f"sizes: expected search, validation and test, received {sorted(self.sizes)}"
            )
        check_shares(self.divide)
        return self

    def loaded(self, folder: Path, where: str) -> Self:
        """The section with absolute files, once its functions have been imported.

        Raises:
            InputError: If one cannot be.
        """
        update = {key: located(name, folder) for key, name in self._functions.items()}
        changed = self.model_copy(update=update)
        source = {
            name: source_digest(find_function(name, f"{where}.{key}"))
            for key, name in update.items()
        }
        return changed.model_copy(update={"source": source})

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.python import PythonFunction

        evaluator = PythonFunction(**self._arguments(where))
        evaluator.deterministic = self.deterministic
        return evaluator

    def _arguments(self, where: str) -> dict[str, Any]:
        """Arguments of every evaluator that is a function."""
        return {
            "function": self.function,
            "objectives": [Objective(**objective.model_dump()) for objective in self.objectives],
            **self.model_dump(include={"inputs", "sizes", "divide", "source"}),
            "bounds": metrics_of(self.constraints),
            "model_class": None if self.model == "none" else self.model_class,
            "where": where,
        }


#: A group of tensors: no blank, which ends a pattern, and no dot, which ends a parameter's name.
GroupName = Annotated[str, Key(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
Pattern = Annotated[str, Key(pattern=r"^[^\s]{1,200}$")]


class TaskMasksSpec(PythonSpec):
    """One sum of changes under the mask of each task, with routed tasks, measured by a function."""

    kind: Literal["task_masks"]  # type: ignore[assignment]
    model: Literal["module"] = Key(
        default="module", description="The function is always handed the merged model."
    )
    groups: dict[GroupName, Annotated[list[Pattern], Key(min_length=1)]] = Key(
        default_factory=lambda: {"all": ["*"]},
        min_length=1,
        description="Group -> patterns of tensor names, such as *attention*; the scale of its "
        "changes and the threshold of its masks are searched. A tensor belongs to the first group "
        "that fits; those of none have scale 1 and the threshold below.",
    )
    threshold: float = Key(
        default=0.6,
        ge=0,
        le=2,
        description="Start of all thresholds: how much of a weight's change must be the task's "
        "own.",
    )
    router: Literal["head", "learned", "none"] = Key(
        default="head",
        description="What infers the task of an item: head compares its features with what the "
        "experts' heads read (MergeVLA), learned is trained on observations; none infers none.",
    )
    directions: int = Key(
        default=8, ge=1, description="Leading singular vectors of each head that head goes by."
    )
    observations: str | None = Key(
        default=None,
        description="For learned: module:name or file.py:name, called with the name of an expert; "
        "gives first observations of its task as arguments of the model.",
    )
    router_width: int = Key(default=64, ge=1, description="Hidden width of learned.")
    router_steps: int = Key(
        default=100, ge=1, le=10000, description="Training steps of learned, on all observations."
    )
    router_seed: int = Key(default=0, ge=0, description="Seed of the first weights of learned.")

    @model_validator(mode="after")
    def _observed(self) -> Self:
        if (self.router == "learned") != (self.observations is not None):
            raise ValueError(
                "observations: expected a function with router: learned, and only there"
            )
        if self.observations is not None and not is_reference(self.observations):
            raise ValueError(
                f"observations: expected module:name or file.py:name, received "
                f"{self.observations!r}"
            )
        return self

    @property
    def _functions(self) -> dict[str, str]:
        """Key -> name of each function, that of observations among them."""
        observations = {} if self.observations is None else {"observations": self.observations}
        return super()._functions | observations

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.routing.task_masks import TaskMasks

        keys = {"groups", "threshold", "router", "directions", "observations"}
        training = {key: getattr(self, f"router_{key}") for key in ("width", "steps", "seed")}
        own = self.model_dump(include=keys)
        evaluator = TaskMasks(**own, training=training, **self._arguments(where))
        evaluator.deterministic = self.deterministic
        return evaluator
