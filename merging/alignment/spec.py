"""The ``align`` key of an expert: how it is brought into the coordinates of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec, file_versions

Method = Literal["weight_matching", "activation_matching", "procrustes", "transport", "pleas"]
#: What each method does, for ``check``.
DONE: Mapping[str, str] = {
    "weight_matching": "units reordered to agree in weights",
    "activation_matching": "units reordered to agree in activations",
    "procrustes": "units reordered to agree in weights, channels of heads turned",
    "transport": "units mixed by optimal transport between activations",
    "pleas": "units reordered, those that agree least kept apart in wider layers",
}
#: Methods that compare activations.
ON_ITEMS = frozenset({"activation_matching", "transport"})


class AlignSpec(BaseModel):
    """How an expert that was trained from another start is brought into the base's coordinates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field(
        description="weight_matching (git re-basin), activation_matching, procrustes (weight "
        "matching, then rotations of channels within heads), transport (optimal-transport fusion), "
        "pleas (partial matching in wider layers)",
    )
    calibration: CalibrationSpec | None = Field(
        None,
        description="items that activations are compared on: a datasets folder, the model's auto "
        "class and its inputs; pleas matches by weights without them",
    )
    seed: int = Field(0, ge=0, description="of the order in which groups of units take turns")
    sweeps: int = Field(100, ge=1, description="over all groups of units, at most")
    fraction: float = Field(
        0.25,
        ge=0,
        le=1,
        description="for pleas: share of the hidden units of each model that are kept apart; "
        "layers get wider by it",
    )
    smoothing: float = Field(
        0.08, gt=0, description="for transport: entropy of the plan, in units of squared distance"
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
