"""The file that says which checkpoints and items a protocol runs on.

Base, experts and ``evaluators`` are those of a study file, with the same checks and messages; the
rest says which objectives score which task. Nothing here reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mergesearch.merging import InputError
from mergesearch.merging.errors import did_you_mean
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.foreign.yaml_text import read_yaml
from mergesearch.search.spec.study_file import all_of, explain

#: Sections of a study file that mean the same here.
STUDY_KEYS = ("seed", "special", "rows", "workers", "allow_code", "allow_unrelated")

#: One name, or a list of them.
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdaptationSection(_Section):
    """What methods follow that move coefficients by a loss of unlabelled items."""

    evaluators: list[dict[str, Any]] = Field(min_length=1)
    steps: int | None = Field(None, ge=1)


class SubsetsSection(_Section):
    """Which subsets of the experts are merged.

    Attributes:
        sizes: Numbers of experts; by default 2 to all.
        draws: Subsets of each size at most; by default all there are.
        seed: Of the draw.
    """

    sizes: list[Annotated[int, Field(ge=2)]] | None = None
    draws: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


class ModelsFile(_Section):
    """The file.

    Attributes:
        name: Of the folder of its results.
        base, experts, evaluators: As in a study file.
        tasks: Expert -> objectives that score its task; the task's score is their mean.
        general: Objectives of what the base can do beside the tasks, for forgetting.
        held_out: Task without an expert -> objectives that score it.
        rates: Minimised objectives that are shares between 0 and 1; they count as 1 − value.
        choose_by: Objectives by which coefficients are chosen on validation items; by default those
            of the merged experts' tasks.
        multitask: A model trained on all tasks, for comparison.
        calibration: Items on which operators run the experts, as in an operator's options.
        adaptation: For methods that follow a loss of unlabelled items.
        exclude: Regular expression of tensors that stay at the base, instead of the protocol's.
        subsets: For protocols of subsets.
        study: More sections of a study file, some of :data:`STUDY_KEYS`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    base: str
    experts: dict[str, Any] = Field(min_length=2)
    evaluators: list[dict[str, Any]] = Field(min_length=1)
    tasks: dict[str, Names]
    general: Names | None = None
    held_out: dict[str, Names] = Field(default_factory=dict)
    rates: tuple[str, ...] = ()
    choose_by: Names | None = None
    multitask: str | None = None
    calibration: dict[str, Any] | None = None
    adaptation: AdaptationSection | None = None
    exclude: str | None = None
    subsets: SubsetsSection = SubsetsSection()
    study: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in self.tasks:
            if name not in self.experts:
                raise ValueError(
                    f"tasks: {shown(name)} is no expert; {did_you_mean(name, self.experts)}"
                )
        missing = [name for name in self.experts if name not in self.tasks]
        if missing:
            raise ValueError(
                f"tasks: expected objectives for every expert, received none for {missing[0]!r}"
            )
        for size in self.subsets.sizes or ():
            if size > len(self.experts):
                raise ValueError(
                    f"subsets.sizes: expected at most {len(self.experts)}, the number of experts, "
                    f"received {size}"
                )
        both = self.tasks.keys() & self.held_out.keys()
        if both:
            raise ValueError(
                f"held_out: expected tasks without an expert, received {sorted(both)[0]!r}"
            )
        for key in self.study:
            if key not in STUDY_KEYS:
                raise ValueError(f"study.{key}: unknown key; {did_you_mean(key, STUDY_KEYS)}")
        if "multitask" in self.experts:
            raise ValueError("experts: expected another name than 'multitask', which is a key")
        return self


@dataclass(frozen=True)
class Models:
    """A file and the folder where its relative paths start."""

    file: ModelsFile
    folder: Path

    def scored_by(self, task: str) -> tuple[str, ...]:
        """Objectives of a task."""
        own: Mapping[str, tuple[str, ...]] = {**self.file.tasks, **self.file.held_out}
        return own[task]

    @property
    def named(self) -> dict[str, tuple[str, ...]]:
        """Key of the file -> objectives that it names."""
        file = self.file
        keys = {f"tasks.{task}": names for task, names in file.tasks.items()}
        keys |= {f"held_out.{task}": names for task, names in file.held_out.items()}
        keys |= {"general": file.general or (), "choose_by": file.choose_by or ()}
        return {**keys, "rates": file.rates}


def models_of(data: Any, where: str, folder: Path) -> Models:
    """Check the content of a file; ``where`` begins messages.

    Raises:
        InputError: With a line for each problem.
    """
    if not isinstance(data, dict):
        raise InputError(
            f"{where}: expected a mapping with base, experts, tasks and evaluators, received "
            f"{shown(data)}"
        )
    try:
        return Models(ModelsFile.model_validate(data), folder)
    except ValidationError as error:
        raise InputError(all_of(where, explain(error, ModelsFile))) from None


def read_models(path: Path) -> Models:
    """Read and check a file.

    Raises:
        InputError: With a line for each problem.
    """
    data = read_yaml(path, what="a file of models")
    return models_of(data, name_shown(str(path), 200), resolved(path).parent)
