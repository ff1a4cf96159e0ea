"""The base of all sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic import Field as Key

from mergesearch.merging.foreign.sizes import sized


class Section(BaseModel):
    """A frozen section that allows no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    most: ClassVar[Mapping[str, int]] = {}

    @field_validator("*")
    @classmethod
    def _sized(cls, value: Any, info: ValidationInfo) -> Any:
        return sized(value, info.field_name, cls.most) if isinstance(value, int) else value


class ModelSection(Section):
    """A section of an evaluator that runs a model.

    Attributes:
        any_library: Whether the model may be of another library than transformers.
    """

    any_library: ClassVar[bool] = False

    head: str | None = Key(
        default=None,
        min_length=1,
        # Sections without it read, and hash, as those of older studies.
        exclude_if=lambda head: head is None,
        description="Expert whose head scores the items, where experts keep heads of their own "
        "(special.heads: own); by default that of each domain's expert.",
    )
    quantise: Literal["int8", "int4", "q4_k"] | None = Key(
        default=None,
        exclude_if=lambda kind: kind is None,
        description="Score the model with its matrices rounded to int8 (a scale for each output), "
        "int4 (for each 128 inputs of an output), or q4_k (as GGUF has it); by default as merged.",
    )
