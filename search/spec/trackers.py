"""The ``trackers:`` entries of a study file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergesearch.merging import InputError
from mergesearch.search.spec.storage_url import split_url

#: Tracker -> options that mean something to it, beside ``name``, ``run`` and ``folder``.
OPTIONS = {
    "tensorboard": frozenset[str](),
    "mlflow": frozenset({"project", "uri", "tags"}),
    "wandb": frozenset({"project", "uri", "tags"}),
}


class TrackerSpec(BaseModel):
    """A tracker: its bare name, or a mapping of ``name`` and options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Literal["tensorboard", "mlflow", "wandb"] = Field(description="which tracker it is")
    project: str | None = Field(
        None, min_length=1, description="experiment or project; default mergesearch"
    )
    uri: str | None = Field(
        None,
        description="server, ${NAME} is read from the environment; default: a local store, or "
        "wandb's own setting",
    )
    folder: str | None = Field(
        None, description="where local files go; default: trackers in the run folder"
    )
    run: str | None = Field(
        None, min_length=1, description="name shown for the run; default: the study's"
    )
    tags: dict[str, str] = Field(default_factory=dict, description="labels of the run")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> TrackerSpec:
        given = self.model_fields_set - {"name", "run", "folder"}
        foreign = sorted(given - OPTIONS[self.name])
        if foreign:
            known = ", ".join(sorted(OPTIONS[self.name] | {"folder", "run"}))
            raise ValueError(
                f"expected options of {self.name} ({known}), received {', '.join(foreign)}"
            )
        return self

    @model_validator(mode="after")
    def _without_password(self) -> TrackerSpec:
        password = split_url(self.uri, "trackers: uri").password if self.uri else None
        if password and "${" not in password:
            # Not a ValueError: those are shown with what was received.
            raise InputError(
                f"trackers: {self.name}: uri: expected the password as ${{NAME}}, to be read from "
                "the environment, received it in plain text; replace it"
            )
        return self
