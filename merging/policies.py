"""Special tensors: what happens to them is decided once, before any operator sees them.

Vocabularies, running statistics, logarithmic scalars, new heads and ties cannot be merged like
other task vectors. Each has a policy here; the defaults refuse what has no obvious meaning. Which
tensors of given checkpoints a policy concerns is worked out in :mod:`mergesearch.merging.family`;
how the concerned ones are combined is the :class:`SpecialTensors` of a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mergesearch.merging.alignment.spec import AlignSpec, named_method
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.foreign.shown import shown
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
    align: dict[
        str,
        Annotated[AlignSpec, BeforeValidator(named_method, json_schema_input_type=AlignSpec | str)],
    ] = Field(
        default_factory=dict,
        description="expert -> how it is brought into the coordinates of the base, if it was "
        "trained from another start: a method, or a mapping with its options; an expert's own "
        "`align: METHOD` says the same",
    )
    unlock: tuple[str, ...] = Field(
        (),
        description="names of experts that were locked against merging, or turned inside their "
        "heads: these are brought back to where they are nearest to the base's, by least squares, "
        "which leaves each expert's function as it was; an expert's own `unlock: true` says the "
        "same",
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

    @model_validator(mode="after")
    def _check_align(self) -> Self:
        if self.align and self.heads == "own":
            raise ValueError(
                "align: expected heads that are merged or the base's, because a head of its own "
                "reads units in the expert's order; set heads to base or average"
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


def choices_text(choices: Choices) -> str:
    """Chosen policies in one line."""
    texts = {name: ", ".join(v) if isinstance(v, tuple | list) else str(v) for name, v in choices}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def split_options(experts: Any, special: Any) -> tuple[Any, Any]:
    """Experts by path alone, and policies with what ``{path: ..., align: ...}`` said of them.

    The options of an expert are ``align`` and ``unlock``.

    Anything else is returned as it is, for its own check.

    Raises:
        RecipeError: If an expert has other keys.
    """
    if not isinstance(experts, Mapping):
        return experts, special
    own = {name: value for name, value in experts.items() if isinstance(value, Mapping)}
    if not own or not isinstance(special, Mapping | None):
        return experts, special
    for name, value in own.items():
        _check_expert(name, value)
    unlocked = [str(name) for name, value in own.items() if value.get("unlock")]
    placed = {str(name): value["align"] for name, value in own.items() if value.get("align")}
    paths = {name: own[name]["path"] if name in own else value for name, value in experts.items()}
    said = dict(special or {})
    if unlocked:
        said["unlock"] = list(dict.fromkeys([*said.get("unlock", ()), *unlocked]))
    if placed:
        said["align"] = {**said.get("align", {}), **placed}
    return paths, said if unlocked or placed else special


def _check_expert(name: Any, value: Mapping[str, Any]) -> None:
    fits = {"path"} <= set(value) <= {"path", "align", "unlock"} and isinstance(value["path"], str)
    if not fits or not isinstance(value.get("unlock", False), bool):
        raise RecipeError(
            f"experts.{shown(name)}: expected a path, or {{path: PATH}} with align or "
            f"unlock, received {shown(dict(value))}"
        )


def located_special(policies: TensorPolicies, absolute: Callable[[str], str]) -> TensorPolicies:
    """The policies with the paths of their data made absolute."""
    update: dict[str, Any] = {}
    if policies.calibration is not None:
        update["calibration"] = _located(policies.calibration, absolute)
    if any(spec.calibration is not None for spec in policies.align.values()):
        update["align"] = {
            name: spec
            if spec.calibration is None
            else spec.model_copy(update={"calibration": _located(spec.calibration, absolute)})
            for name, spec in policies.align.items()
        }
    return policies.model_copy(update=update) if update else policies


def _located(calibration: CalibrationSpec, absolute: Callable[[str], str]) -> dict[str, Any]:
    data = calibration["data"]
    paths = (
        absolute(data)
        if isinstance(data, str)
        else {name: absolute(path) for name, path in data.items()}
    )
    return {**calibration, "data": paths}


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
        return f"unknown key {shown(key)}; known keys are {', '.join(TensorPolicies.model_fields)}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, received {shown(first['input'])}"
