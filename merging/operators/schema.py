"""Annotations of hyperparameters in words, for messages and for the documentation."""

from __future__ import annotations

import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def meaning(parameter: inspect.Parameter) -> str:
    """The description of a hyperparameter in its annotation, empty if it has none."""
    extras = (
        get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
    )
    # The outermost of nested annotations comes last, and describes the hyperparameter itself.
    described = (getattr(extra, "description", None) for extra in reversed(extras))
    return next((text for text in described if text), "")


def type_text(annotation: Any) -> str:
    """An annotation in words: choices, a number with its limits, a list."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        limits = [
            _limit(item)
            for extra in arguments[1:]
            for item in (*getattr(extra, "metadata", ()), extra)
        ]
        inner = type_text(arguments[0])
        stated = ", ".join(limit for limit in limits if limit)
        return f"{inner} ({stated})" if stated else inner
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


def count_text(least: int, most: int | None, unlimited: str) -> str:
    """A range of counts in words; ``unlimited`` is how one without a greatest is put."""
    if most is None:
        return unlimited
    return f"{least}" if least == most else f"{least} to {most}"


_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _limit(item: Any) -> str:
    return " ".join(
        f"{sign} {getattr(item, name):g}"
        for name, sign in _SIGNS.items()
        if _is_number(getattr(item, name, None))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
