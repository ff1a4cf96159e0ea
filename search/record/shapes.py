"""Shapes of what a record holds: types and ranges that are checked before anything is used.

Each is a typed dictionary, which pydantic checks strictly: a text is no number, true is no 1.
Keys that a shape does not know, of later versions, pass.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mergesearch.merging.errors import InputError, RunFolderError
from mergesearch.merging.extensions.entry_points import Kind
from mergesearch.merging.foreign.shown import name_shown, shown

#: A finite number, and one that may be NaN or infinite (a standard error of one item).
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Numbers = dict[str, float]
Values = dict[str, Finite]
#: A moment in seconds since 1970; clocks end in the year 9999.
Moment = Annotated[float, Field(ge=0, lt=253_402_300_800)]
Name = Annotated[str, StringConstraints(max_length=10_000)]


class FieldShape(TypedDict):
    """Coefficients over the flat index."""

    boundaries: list[Annotated[int, Field(ge=0, lt=1 << 62)]]
    values: list[list[Finite]]


class Asked(TypedDict):
    """What is recorded when a trial is asked."""

    kind: Literal["anchor", "search", "recommended", "taken"]
    name: Name
    suggestion: Count | None
    tells_at_ask: Count
    point: str | None
    field: FieldShape | None
    number: NotRequired[Count]
    lost: NotRequired[bool]
    told_at: NotRequired[Count]
    item_count: NotRequired[Count | None]
    gradient_items: NotRequired[Count]
    retry_of: NotRequired[Count | None]
    same_as: NotRequired[Count | None]
    operator: NotRequired[Name]
    hyperparameters: NotRequired[dict[str, Any]]
    routing: NotRequired[dict[str, Any]]
    mixture: NotRequired[dict[str, Any]]


class FailureShape(TypedDict):
    """Why a trial failed."""

    kind: Name
    message: str
    detail: NotRequired[str]


class Result(TypedDict):
    """What is recorded when a trial is told."""

    tell_index: Count | None
    seconds: Numbers
    errors: Numbers
    failure: FailureShape | None
    worker: Name
    finished: Moment
    cpu_share: NotRequired[Finite | None]
    batch_size: NotRequired[Count | None]
    values: NotRequired[Values]
    rungs: NotRequired[dict[Annotated[str, StringConstraints(pattern=r"^\d{1,15}$")], Values]]
    stopped: NotRequired[Count | None]
    estimates: NotRequired[Numbers]
    estimate_errors: NotRequired[Numbers]
    violations: NotRequired[Numbers]


class GradientShape(TypedDict):
    """The result of gradient steps."""

    losses: list[float]
    gradient: NotRequired[str]
    count: NotRequired[Count]
    raw: NotRequired[str]
    moments: NotRequired[str]


class ScoreShape(TypedDict):
    """A score on another split."""

    values: Values
    errors: Numbers
    items: dict[str, str]
    violations: NotRequired[Numbers]
    weights: NotRequired[dict[str, str]]
    resampled: NotRequired[dict[str, str]]


class ScoreEntry(TypedDict):
    """A score, or None for a re-evaluation that failed."""

    score: ScoreShape | None


class VerdictShape(TypedDict):
    """The final choice."""

    winner: Count
    front: list[Count]
    leaders: list[Count]
    front_estimated: NotRequired[list[Count]]


class AllowanceShape(TypedDict):
    """A change of the budget."""

    budget: dict[str, Any]
    trial: Count
    asked: Count
    told: Count
    suggestions: Count | None
    tested: NotRequired[bool]


class ChoiceShape(TypedDict):
    """Operators that a study has chosen."""

    members: Annotated[list[Name], Field(min_length=1)]
    coefficients: list[Finite]


class LineageShape(TypedDict):
    """Where an expert comes from."""

    expert: Name
    kind: Name
    cosine: float | None
    distance: float | None
    finding: str


class PluginEntry(TypedDict):
    """A plug-in that the study uses."""

    kind: Kind
    name: str
    package: str
    version: str


PLUGIN_KEYS = tuple(PluginEntry.__annotations__)


class DeviceShape(TypedDict, total=False):
    """A device; see :class:`mergesearch.search.workers.devices.Device`."""

    name: str | None
    count: int | None
    capability: str | None
    driver: str | None
    cuda: str | None
    tf32: bool | None
    deterministic: bool | None
    attention: str | None
    dtype: str | None


class DeviceEntry(TypedDict):
    """A device, and the workers that compute on it."""

    device: DeviceShape
    workers: list[str]


class Environment(TypedDict):
    """What is read of ``environment.json``."""

    plugins: NotRequired[list[PluginEntry]]
    devices: NotRequired[list[DeviceEntry]]


Lines = list[str]

#: Attribute of a study, or the word that it begins with, -> the shape of its value.
STUDY_SHAPES: dict[str, Any] = {
    "allowances": list[AllowanceShape] | None,
    "code": dict[str, str] | None,
    "fingerprints": list[str] | None,
    "lineage warnings": Lines | None,
    "lineages": list[LineageShape] | None,
    "mended": Lines | None,
    "operators": ChoiceShape | None,
    "predicted seconds": Numbers | None,
    "references": dict[str, Numbers] | None,
    "repaired": Lines | None,
    "repeats": list[Values | None] | None,
    "score": ScoreEntry | None,
    "searched": bool | None,
    "set aside": Lines | None,
    "start": str | None,
    "start notes": Lines | None,
    "strategy": Name | None,
    "study": dict[str, Any] | None,
    "suggestions": Count | None,
    "taken scores": Lines | None,
    "tracker": Name | None,
    "verdict": VerdictShape | None,
    "warnings": Lines | None,
}


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def conform(shape: Any, value: Any, where: str, error: type[InputError] = RunFolderError) -> Any:
    """The value, unchanged, once it is known to have a shape.

    Args:
        shape: A typed dictionary or any other type that pydantic knows.
        value: As JSON gave it.
        where: The file and the place, as errors name it.
        error: The class of errors.

    Raises:
        InputError: Of the class ``error``, in one line, with what was expected and received.
    """
    try:
        _adapter(shape).validate_python(value, strict=True)
        return value
    except ValidationError as cause:
        problem = cause.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise error(f"{where}: expected a few levels of nesting, received more") from None
    path = "".join(f"{name_shown(str(part), 40)}: " for part in problem["loc"][:4])
    if problem["type"] == "missing":
        raise error(f"{where}: {path}expected this key, received none")
    told = problem["msg"].removeprefix("Input should be ").removeprefix("String should have ")
    raise error(f"{where}: {path}expected {told}, received {shown(problem['input'], 40)}")
