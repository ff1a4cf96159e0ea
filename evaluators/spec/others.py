"""Sections of evaluators without a ``datasets`` folder: problems, programs, and the distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic import Field as Key

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import ProgramBoundSpec, Section, metrics_of
from mergesearch.evaluators.spec.section import ModelSection

Share = Annotated[float, Key(ge=0, le=1)]


class FaultsSpec(Section):
    """Shares of all recipes that fail, for trying out a cluster."""

    nan: Share = Key(default=0.0, description="The losses are NaN.")
    error: Share = Key(default=0.0, description="The evaluation raises.")
    kill: Share = Key(default=0.0, description="The evaluating process kills itself with SIGKILL.")


class SyntheticSpec(Section):
    """An analytic problem; no model, no data."""

    most: ClassVar[Mapping[str, int]] = {"items": 10**6, "objectives": 1000}
    kind: Literal["synthetic"]
    problem: Literal["sphere", "ellipsoid", "quadratic_tasks", "zdt1"] = Key(
        description="Analytic problem that takes the place of a model."
    )
    objectives: int | None = Key(
        default=None, ge=1, description="Number of losses, for quadratic_tasks."
    )
    seed: int = Key(default=0, ge=0, description="Seed of optima, rotations and noise.")
    noise: float = Key(default=0.0, ge=0, description="Standard deviation of the measured losses.")
    items: int = Key(
        default=0, ge=0, description="Items per split; gives item scores and standard errors."
    )
    seconds: float = Key(default=0.0, ge=0, description="How long an evaluation takes at least.")
    spread: float = Key(
        default=1.0, ge=1, description="How many times as long it takes at most, by recipe."
    )
    faults: FaultsSpec = FaultsSpec()

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.synthetic import Faults, Synthetic

        options = self.model_dump(exclude={"kind", "faults"})
        return Synthetic(**options, faults=Faults(**self.faults.model_dump()), where=where)


def _words(value: Any) -> Any:
    """Split a command line in one string into words; no shell reads it."""
    import shlex

    return shlex.split(value) if isinstance(value, str) else value


class ObjectiveSpec(Section):
    """One objective that a program measures."""

    name: str = Key(min_length=1, description="As the scores are called.")
    direction: Literal["maximize", "minimize"] = Key(description="Which way is better.")


def check_some(
    objectives: Sequence[ObjectiveSpec], constraints: Sequence[ProgramBoundSpec]
) -> None:
    """Refuse a section that asks for nothing.

    Raises:
        ValueError: If there is neither an objective nor a bound.
    """
    if not objectives and not constraints:
        raise ValueError("objectives: expected at least one, or constraints, received neither")


class CommandSpec(ModelSection):
    """Objectives that another program measures: JSON in, JSON out, one process per trial."""

    any_library: ClassVar[bool] = True
    kind: Literal["command"]
    command: Annotated[list[str], BeforeValidator(_words), Key(min_length=1)] = Key(
        description="Program and arguments, as a list or one string; no shell."
    )
    objectives: list[ObjectiveSpec] = Key(
        description="What the program measures; none where it only guards others by constraints."
    )
    constraints: list[ProgramBoundSpec] = Key(
        default_factory=list,
        exclude_if=lambda bounds: not bounds,  # older studies have no such key, and their hash
        description="Bounds that merges must keep, on objectives or on other scores.",
    )
    timeout: float = Key(
        default=600.0, gt=0, description="Seconds that it may take; then it is ended."
    )
    inputs: Any = Key(default=None, description="Anything; handed to the program as it is.")
    model: Literal["folder", "none"] = Key(
        default="folder",
        description="Save the merged model for the program, or hand over the recipe alone.",
    )
    model_class: str | None = Key(
        default=None,
        description="transformers auto class of the model; by default AutoModelForCausalLM.",
    )
    tokenizer: str | None = Key(
        default=None,
        description="Checkpoint whose tokenizer goes beside the model; by default the base.",
    )
    sizes: dict[Literal["search", "validation", "test"], Annotated[int, Key(ge=1)]] | None = Key(
        default=None, description="Items of each split, where the program scores them one by one."
    )
    folder: str = Key(
        default=".", description="Where the program runs; paths with a slash start there."
    )
    deterministic: bool = Key(
        default=False,
        exclude_if=lambda same: not same,  # older studies have no such key, and their hash
        description="Whether the program scores a merge the same each time; one that was measured "
        "before is then answered from the record.",
    )

    @property
    def runs_code(self) -> bool:
        """Whether the section runs code, which it always does."""
        return True

    @model_validator(mode="after")
    def _whole(self) -> Self:
        check_some(self.objectives, self.constraints)
        if self.model == "none" and self.model_class is not None:
            raise ValueError(
                f"model_class: expected null with model: none, received {self.model_class}"
            )
        if self.sizes is not None and set(self.sizes) != {"search", "validation", "test"}:
            raise ValueError(
                f"sizes: expected search, validation and test, received {sorted(self.sizes)}"
            )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.base import Objective
        from mergesearch.evaluators.command import Command

        own = self.model_dump(include={"timeout", "inputs", "sizes", "tokenizer"})
        model_class = None if self.model == "none" else self.model_class or "AutoModelForCausalLM"
        objectives = [Objective(**objective.model_dump()) for objective in self.objectives]
        evaluator = Command(
            self.command,
            objectives,
            **own,
            bounds=metrics_of(self.constraints),
            model_class=model_class,
            folder=folder / self.folder,
            where=where,
        )
        evaluator.deterministic = self.deterministic
        return evaluator


class DistanceSpec(ModelSection):
    """How far a merge is from the base, without any item."""

    any_library: ClassVar[bool] = True
    kind: Literal["distance"]
    name: str = Key(default="distance", min_length=1, description="Name of the objective.")
    model_class: str = Key(
        default="AutoModelForCausalLM", description="transformers auto class of the model."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.distance import Distance

        return Distance(self.name, self.model_class, where)
