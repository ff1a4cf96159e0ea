"""Special tensors: what happens to them is decided once, before any operator sees them.

Vocabularies, running statistics, logarithmic scalars, new heads and ties cannot be merged like
other task vectors. Each has a policy here; the defaults refuse what has no obvious meaning. Which
tensors of given checkpoints a policy concerns is worked out in :mod:`mergesearch.merging.family`;
how the concerned ones are combined is the :class:`SpecialTensors` of a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.models.calibration_spec import CalibrationSpec

Choices = tuple[tuple[str, Any], ...]


class TensorPolicies(BaseModel):
    """The ``special`` section of recipes and study files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: Literal["same", "base", "union", "common"] = Field(
        "same",
        description="rows of embeddings and heads: same refuses different vocabularies; the others "
        "align rows by token and keep the tokens of the base, of all sources, or those that all "
        "have",
    )
    batch_norm: Literal["refuse", "base", "merge", "recalibrate"] = Field(
        "refuse",
        description="running statistics of BatchNorm: copied from the base, merged linearly "
        "whatever the operator, or recomputed after every merge on the items of calibration",
    )
    calibration: CalibrationSpec | None = Field(
        None,
        description="for batch_norm recalibrate: a datasets folder, the model's auto class and its "
        "inputs",
    )
    scalars: Literal["merge", "log", "base"] = Field(
        "merge",
        description="tensors without dimensions: merged as any other, as logarithms (positive ones "
        "that are not stored as logarithms already), or copied from the base",
    )
    heads: Literal["refuse", "own", "base", "average"] = Field(
        "refuse",
        description="heads that do not line up, and classifiers of other label sets: own merges "
        "the shared part and keeps each expert's head for its tasks; base and average keep the "
        "base's heads, or the average of the experts', whatever the coefficients",
    )
    absent: Literal["refuse", "base_zero", "average", "own"] = Field(
        "refuse",
        description="tensors of all experts that the base lacks: the base's are zero, or the "
        "average of the experts whatever the coefficients; own: tensors of any expert that the "
        "base lacks stay that expert's, and those of exactly one are added to the exported model; "
        "tensors that experts lack are then kept from the base",
    )
    tied: Literal["refuse", "untie"] = Field(
        "refuse",
        description="output heads that some sources tie to the embedding and others do not: untie "
        "all",
    )

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        if (self.batch_norm == "recalibrate") != (self.calibration is not None):
            raise ValueError("expected calibration with batch_norm: recalibrate, and only there")
        if self.calibration is not None and "prompts" in self.calibration:
            raise ValueError(
                "calibration.prompts: expected none, because running statistics need no answers; "
                "leave them out"
            )
        return self

    @property
    def keeps_own(self) -> bool:
        """Whether experts may keep tensors of their own, which no merge acts on."""
        return "own" in (self.heads, self.absent)

    @property
    def choices(self) -> Choices:
        """What differs from the defaults, as sorted ``(name, value)`` pairs, as recipes hold it."""
        return tuple(sorted(self.model_dump(exclude_defaults=True).items()))


def located_special(policies: TensorPolicies, absolute: Callable[[str], str]) -> TensorPolicies:
    """The policies with the paths of their data made absolute."""
    if policies.calibration is None:
        return policies
    data = policies.calibration["data"]
    paths = (
        absolute(data)
        if isinstance(data, str)
        else {name: absolute(path) for name, path in data.items()}
    )
    return policies.model_copy(update={"calibration": {**policies.calibration, "data": paths}})


def parse_policies(value: TensorPolicies | Mapping[str, Any] | Choices | None) -> TensorPolicies:
    """The policies from the form in which a recipe or a caller gives them.

    What is not given has its default.

    Raises:
        RecipeError: If a key is unknown, or a value is not one of its choices.
    """
    if isinstance(value, TensorPolicies):
        return value
    try:
        return TensorPolicies.model_validate({} if value is None else dict(value))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"special: {_explained(error)}") from None


def _explained(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return (
            f"expected a mapping with some of {', '.join(TensorPolicies.model_fields)}, received "
            "something else"
        )
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known keys are {', '.join(TensorPolicies.model_fields)}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, received {first['input']!r}"
