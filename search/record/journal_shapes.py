"""Shapes of the lines of a journal, by the code of their operation."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mergesearch.search.record.shapes import Count, Finite, Name

OneMember = Annotated[dict[str, Any], Field(min_length=1, max_length=1)]
State = Annotated[int, Field(ge=0, le=4)]


class CreateStudy(TypedDict):
    """A new study."""

    worker_id: str
    study_name: Name
    directions: Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(min_length=1)]


class DeleteStudy(TypedDict):
    """The end of a study."""

    worker_id: str
    study_id: Count


class StudyUserAttribute(TypedDict):
    """An attribute of a study, for people."""

    worker_id: str
    study_id: Count
    user_attr: OneMember


class StudySystemAttribute(TypedDict):
    """An attribute of a study, for programs."""

    worker_id: str
    study_id: Count
    system_attr: OneMember


class CreateTrial(TypedDict):
    """A new trial."""

    worker_id: str
    study_id: Count
    datetime_start: str | None
    datetime_complete: NotRequired[str]
    state: NotRequired[State]
    value: NotRequired[Finite | None]
    values: NotRequired[list[Finite] | None]
    distributions: NotRequired[dict[str, str]]
    params: NotRequired[dict[str, Finite]]
    user_attrs: NotRequired[dict[str, Any]]
    system_attrs: NotRequired[dict[str, Any]]
    intermediate_values: NotRequired[dict[Annotated[str, Field(pattern=r"^\d{1,15}$")], float]]


class SetParameter(TypedDict):
    """A parameter of a trial."""

    worker_id: str
    trial_id: Count
    param_name: Name
    param_value_internal: Finite
    distribution: str


class SetState(TypedDict):
    """The state of a trial, with its values."""

    worker_id: str
    trial_id: Count
    state: State
    values: list[Finite] | None
    datetime_start: NotRequired[str]
    datetime_complete: NotRequired[str]


class SetIntermediate(TypedDict):
    """A value of a trial on its way."""

    worker_id: str
    trial_id: Count
    step: Count
    intermediate_value: float


class TrialUserAttribute(TypedDict):
    """An attribute of a trial, for people."""

    worker_id: str
    trial_id: Count
    user_attr: OneMember


class TrialSystemAttribute(TypedDict):
    """An attribute of a trial, for programs."""

    worker_id: str
    trial_id: Count
    system_attr: OneMember


#: Operation code -> the shape of its line.
SHAPES: dict[int, Any] = {
    0: CreateStudy,
    1: DeleteStudy,
    2: StudyUserAttribute,
    3: StudySystemAttribute,
    4: CreateTrial,
    5: SetParameter,
    6: SetState,
    7: SetIntermediate,
    8: TrialUserAttribute,
    9: TrialSystemAttribute,
}
