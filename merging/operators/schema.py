"""Annotations of hyperparameters in the words of readers, for messages and for the
documentation.
"""

from __future__ import annotations

import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def meaning(parameter: inspect.Parameter) -> str:
    """What a hyperparameter is, from the description in its annotation."""
    extras = (
        get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
    )
    return next((text for extra in extras if (text := getattr(extra, "description", None))), "")


def type_text(annotation: Any) -> str:
    """An annotation as readers want it: choices, number with its limits, list."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        limits = [
            _limit(item)
            for extra in arguments[1:]
            for item in (*getattr(extra, "metadata", ()), extra)
        ]
        inner = type_text(arguments[0])
        found = ", ".join(limit for limit in limits if limit)
        return f"{inner} ({found})" if found else inner
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, dict):
        return "mapping"
    names = {
        float: "number",
        int: "whole number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return names.get(
        annotation,
        "mapping" if origin is dict else getattr(annotation, "__name__", str(annotation)),
    )


_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _limit(item: Any) -> str:
    found = [
        f"{sign} {getattr(item, name):g}"
        for name, sign in _SIGNS.items()
        if _is_number(getattr(item, name, None))
    ]
    return " ".join(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
