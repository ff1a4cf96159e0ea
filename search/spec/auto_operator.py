"""``operator: auto``: operators are measured, and the search goes on from the best."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergesearch.merging import InputError
from mergesearch.search.spec.sections import OperatorSection

#: The name in place of an operator's.
AUTO_OPERATOR = "auto"


class AutoOperator(BaseModel):
    """Options of ``operator: {name: auto, ...}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    among: list[str] | None = Field(
        None, min_length=1, description="operators to measure; default: a list by what is known"
    )
    most: int = Field(6, ge=1, strict=True, description="operators to measure at most")
    keep: int = Field(
        3, ge=1, strict=True, description="operators whose merges the search interpolates"
    )
    minutes: float = Field(30, gt=0, description="preparation of all of them at most, as expected")
    calibration: dict[str, Any] | None = Field(
        None, description="items for operators that run the experts, as in their own option"
    )


def auto_operator(section: OperatorSection) -> AutoOperator:
    """The options of a section that is named ``auto``.

    Raises:
        InputError: If one is unknown or has a value that is not allowed.
    """
    try:
        return AutoOperator.model_validate(section.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(AutoOperator.model_fields)
            raise InputError(
                f"operator.{key}: expected one of {known} for operator auto, received {key!r}"
            ) from None
        raise InputError(f"operator.{key}: {first['msg']}, received {first['input']!r}") from None
