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
        builder = (self.model_class,) if self._builds else ()
        return (self.function, *builder)

    @property
    def _builds(self) -> bool:
        return self.model == "module" and is_reference(self.model_class)

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
        update: dict[str, Any] = {"function": located(self.function, folder)}
        if self._builds:
            update["model_class"] = located(self.model_class, folder)
        changed = self.model_copy(update=update)
        keys = ("function", "model_class")
        source = {
            name: source_digest(find_function(name, f"{where}.{key}"))
            for name, key in zip(changed.references, keys, strict=False)
        }
        return changed.model_copy(update={"source": source})

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.python import PythonFunction

        return PythonFunction(
            self.function,
            [Objective(**objective.model_dump()) for objective in self.objectives],
            **self.model_dump(include={"inputs", "sizes", "divide", "source"}),
            bounds=metrics_of(self.constraints),
            model_class=None if self.model == "none" else self.model_class,
            where=where,
        )
