"""Shape of the data of a report, as they are kept in a run folder."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from mergesearch.search.record.shapes import (
    Count,
    FailureShape,
    Finite,
    LineageShape,
    Moment,
    Name,
    Numbers,
    ScoreShape,
    Values,
    VerdictShape,
)


class ObjectiveShape(TypedDict):
    """An objective."""

    name: Name
    direction: Literal["maximize", "minimize"]


class SummaryShape(TypedDict):
    """A trial."""

    number: Count
    kind: Literal["anchor", "search", "recommended", "taken"]
    name: Name
    state: Literal["running", "complete", "partial", "failed"]
    failure: FailureShape | None
    item_count: NotRequired[Count | None]
    values: NotRequired[Values]
    errors: NotRequired[Numbers]
    seconds: NotRequired[Numbers]
    worker: NotRequired[Name]
    finished: NotRequired[Moment]
    cpu_share: NotRequired[Finite | None]
    stopped: NotRequired[Count | None]
    estimates: NotRequired[Numbers]
    estimate_errors: NotRequired[Numbers]
    violations: NotRequired[Numbers]
    batch_size: NotRequired[Count | None]
    retry_of: NotRequired[Count | None]
    same_as: NotRequired[Count | None]


class ScaleShape(TypedDict):
    """The range of every objective."""

    low: list[Finite]
    high: list[Finite]


#: Numbers as keys of JSON, which are texts.
Key = Annotated[str, StringConstraints(pattern=r"^\d{1,15}$")]


class FinalShape(VerdictShape):
    """The final choice with the scores that it follows from."""

    scores: dict[Literal["search", "validation", "test"], dict[Key, ScoreShape]]


class HeatShape(TypedDict):
    """Coefficients of a trial by block."""

    trial: Count
    rows: list[Name]
    columns: list[Name]
    values: list[list[float]]


class ExpectedShape(TypedDict):
    """A merge between measured trials."""

    weights: list[Finite]
    values: list[Finite]
    errors: list[Finite]
    means: list[float]


class BetweenShape(TypedDict):
    """What is expected between measured trials."""

    expected: list[ExpectedShape]
    why: str


class KeptShape(TypedDict):
    """What was made of points and recipes."""

    estimates: dict[Key, list[Finite]]
    members: list[Count]
    coefficients: HeatShape | None
    routing: dict[str, Any]
    mixture: NotRequired[dict[str, Any]]
    means: dict[Key, list[float]]
    directions: list[Name]
    between: NotRequired[BetweenShape | None]


class ResolvedShape(TypedDict):
    """What sentences need of the study itself."""

    reference_scores: NotRequired[dict[str, Numbers] | None]
    selection: NotRequired[dict[str, Any] | None]


class SavedShape(TypedDict):
    """The file."""

    study: Name
    experts: list[Name]
    names: list[Name]
    wall_seconds: Finite
    trials_per_worker: dict[str, Count]
    transductive: bool
    repeats: list[Values | None]
    search_items: Count
    warnings: list[str]
    set_aside: list[str]
    untouched: NotRequired[str]
    lineages: NotRequired[list[LineageShape]]
    predicted_seconds: NotRequired[Numbers]
    tolerances: NotRequired[dict[str, str]]
    objectives: Annotated[list[ObjectiveShape], Field(min_length=1)]
    weights: list[Finite]
    lower: list[float]
    upper: list[float]
    resolved: ResolvedShape
    fingerprint: dict[str, Any]
    scale: ScaleShape | None
    verdict: FinalShape | None
    kept: KeptShape
    records: list[SummaryShape]
