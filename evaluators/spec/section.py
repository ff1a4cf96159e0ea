"""The base of all sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic import Field as Key


class Section(BaseModel):
    """A frozen section that allows no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """A section of an evaluator that runs a model."""

    head: str | None = Key(
        default=None,
        min_length=1,
        # Sections without it read, and hash, as those of older studies.
        exclude_if=lambda head: head is None,
        description="Expert whose head scores the items, where experts keep heads of their own "
        "(special.heads: own); by default that of each domain's expert.",
    )
