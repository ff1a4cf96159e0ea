"""Keys that sections of evaluators share: objectives, bounds, and items of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.spec.data import DESCRIPTION, DataSpec, domain_column, item_files_of
from mergesearch.evaluators.spec.section import ModelSection, Section

if TYPE_CHECKING:
    from mergesearch.evaluators.objectives import Metric


__all__ = ["BoundSpec", "ItemSpec", "ProgramBoundSpec", "ScoreSpec", "Section", "metrics_of"]

#: A number, or the model whose value is the limit.
Limit = float | Literal["base"] | Annotated[str, Key(pattern=r"^expert .+$")]
LIMIT = "A number, base (what the base scores), or expert NAME (what that expert scores)."
TOLERANCE = (
    "How far it may be missed, in the unit of the score (0.02 of an accuracy is two points)."
)


class ScoreSpec(Section):
    """One objective of an evaluator with a single metric."""

    name: str | None = Key(
        default=None, min_length=1, description="Name; by default made from the rest."
    )
    domains: list[str] | None = Key(
        default=None, min_length=1, description="Domains to measure on; by default all."
    )
    reduce: Literal["mean", "worst", "geometric_mean"] = Key(
        default="mean", description="How several domains become one value."
    )
    normalise: Literal["expert", "base", "chance", "forgetting"] | None = Key(
        default=None,
        description="Compare each domain with its expert, the base (retention), a guess, or what "
        "is lost.",
    )
    chance: float | dict[str, float] = Key(
        default=0.0, description="What a guess scores, in all domains or by domain."
    )


class BoundSpec(ScoreSpec):
    """A bound that merges must keep.

    Those that miss it rank behind all that keep it, and do not win as long as one keeps it.
    """

    at_least: Limit | None = Key(default=None, description=LIMIT)
    at_most: Limit | None = Key(default=None, description=LIMIT)
    tolerance: float = Key(default=0.0, ge=0, description=TOLERANCE)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("expected at_least or at_most")
        return self


class ProgramBoundSpec(Section):
    """A bound on a score of a program or function, which need not be an objective.

    Merges that miss it rank behind all that keep it, and do not win as long as one keeps it.
    """

    name: str | None = Key(
        default=None, min_length=1, description="Name; by default made from the rest."
    )
    metric: str = Key(
        min_length=1,
        description="The score, as the program or function calls it; it is asked for beside the "
        "objectives and need not be one.",
    )
    at_least: Limit | None = Key(default=None, description=LIMIT)
    at_most: Limit | None = Key(default=None, description=LIMIT)
    tolerance: float = Key(default=0.0, ge=0, description=TOLERANCE)
    unit: str | None = Key(
        default=None, min_length=1, description="Unit of the score, for people: MB, seconds."
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("expected at_least or at_most")
        return self


def metrics_of(
    scores: Sequence[ScoreSpec | ProgramBoundSpec], metric: str | None = None
) -> list[Metric]:
    """Convert objectives and bounds to those that evaluators take."""
    from mergesearch.evaluators.objectives import Metric

    named: dict[str, Any] = {} if metric is None else {"metric": metric}
    return [Metric(**named, **score.model_dump()) for score in scores]


class ItemSpec(ModelSection):
    """Items of files that a model is run on."""

    data: str | DataSpec = Key(description=DESCRIPTION)
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict,
        description="Names of the three splits in the folder, where they differ.",
    )
    domain: str | None = Key(
        default=None, description="Column that says which domain an item belongs to."
    )
    id: str | None = Key(
        default=None, description="Column of stable ids; by default a hash of the first input."
    )
    batch_size: int = Key(default=256, ge=1, description="Items of a forward pass.")
    max_items: int | None = Key(
        default=None, ge=1, description="Use at most this many search items."
    )
    objectives: list[ScoreSpec] = Key(default_factory=lambda: [ScoreSpec()])
    constraints: list[BoundSpec] = Key(
        default_factory=list, description="Bounds that merges must keep."
    )
    experts: dict[str, str] | None = Key(
        default=None, description="Domain -> expert; by default of the same name."
    )

    def _options(
        self, folder: Path, where: str, metric: str | None, inputs: Mapping[str, str]
    ) -> dict[str, Any]:
        """Arguments that every evaluator of items is built with."""
        domain = domain_column(self.data, self.domain)
        return {
            "data": item_files_of(self.data, folder),
            "metrics": metrics_of([*self.objectives, *self.constraints], metric),
            "splits": self.splits,
            "columns": {**inputs, "label": None, "domain": domain, "id": self.id},
            "batch_size": self.batch_size,
            "max_items": self.max_items,
            "experts": self.experts,
            "where": where,
        }


class TokenizedSpec(ItemSpec):
    """Items that are texts, and the tokenizer that reads them."""

    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    max_length: int | None = Key(
        default=None, ge=1, description="Tokens of an item; by default as the tokenizer says."
    )
    batch_size: int = Key(default=32, ge=1, description="Items of a forward pass.")
