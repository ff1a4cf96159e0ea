"""The ``align`` key of an expert: how it is brought into the coordinates of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec, file_versions

Method = Literal[
    "weight_matching", "activation_matching", "procrustes", "invertible", "transport", "pleas"
]
#: How maps of a branch and of the stream that it is added to are combined.
Residual = Literal["joint", "averaging", "weighted_scalar", "weighted_matrix"]
#: What each method does, for ``check``.
DONE: Mapping[str, str] = {
    "weight_matching": "units reordered to agree in weights",
    "activation_matching": "units reordered to agree in activations",
    "procrustes": "units reordered to agree in weights, channels of heads turned",
    "invertible": "units reordered to agree in weights, channels of heads mapped by matrices that "
    "cancel",
    "transport": "units mixed by optimal transport between activations",
    "pleas": "units reordered, those that agree least kept apart in wider layers",
}
#: Methods that compare activations.
ON_ITEMS = frozenset({"activation_matching", "transport"})
Share = Annotated[float, Field(ge=0, le=1)]


class AlignSpec(BaseModel):
    """How an expert that was trained from another start is brought into the base's coordinates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field(
        description="weight_matching (git re-basin), activation_matching, procrustes (weight "
        "matching, then rotations of channels within heads), invertible (weight matching, then any "
        "maps of channels within heads that cancel), transport (optimal-transport fusion), "
        "pleas (partial matching in wider layers)",
    )
    calibration: CalibrationSpec | None = Field(
        None,
        description="items that activations are compared on: a datasets folder, the model's auto "
        "class and its inputs; pleas matches by weights without them",
    )
    seed: int = Field(0, ge=0, description="of the order in which groups of units take turns")
    sweeps: int = Field(100, ge=1, description="over all groups of units, at most")
    fraction: Share | dict[str, Share] = Field(
        0.25,
        description="for pleas: share of the hidden units of each model that are kept apart; "
        "layers get wider by it. A mapping gives one for each width of the configuration, such as "
        "hidden_sizes.0, and 0 for those that it leaves out",
    )
    smoothing: float = Field(
        0.08, gt=0, description="for transport: entropy of the plan, in units of squared distance"
    )
    residual: Residual = Field(
        "joint",
        # Recipes and studies without it read, and hash, as they did before.
        exclude_if=lambda value: value == "joint",
        description="for transport: maps of the residual stream: joint (one for all layers), or "
        "one for every branch, combined where a branch is added by averaging, weighted_scalar "
        "(shares by the size of all activations of the base) or weighted_matrix (by that of each "
        "unit)",
    )

    @model_validator(mode="after")
    def _check_items(self) -> Self:
        if self.method in ON_ITEMS and self.calibration is None:
            raise ValueError(f"expected calibration for {self.method}, which compares activations")
        return self


def item_versions(spec: AlignSpec) -> list[list[Any]]:
    """Path, size and time of every file of its items, to tell whether they changed since."""
    if spec.calibration is None:
        return []
    return file_versions({"calibration": {**DEFAULTS, **spec.calibration}})


def named_method(value: Any) -> Any:
    """Allow a bare method: ``align: weight_matching``."""
    return {"method": value} if isinstance(value, str) else value
