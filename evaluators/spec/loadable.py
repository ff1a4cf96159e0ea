"""Refuses models that the evaluators cannot load, by the configuration of the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.extensions.references import is_reference
from mergesearch.merging.models.auto_tables import surely_loads

#: Most auto classes that a message names.
NAMED = 3


def check_loadable(
    model_class: str | None,
    base: Checkpoint,
    sections: Sequence[Any],
    whose: str = "the base",
) -> None:
    """Refuse a class that does not load the base, before weights are read.

    Args:
        model_class: The class that the evaluators load, or None.
        base: The base of the study, or the expert whose head is used.
        sections: The study's evaluators.
        whose: Which of them it is, for messages.

    Raises:
        InputError: In one line.
        CheckpointError: If the base is a model of diffusers, and diffusers lacks it.
    """
    from mergesearch.merging.models.model_classes import diffusers_class, is_of_diffusers

    if model_class is None:
        return
    if is_reference(model_class):
        _check_named(model_class, sections)
    elif not base.config:
        raise InputError(
            f"{base.path}: expected a folder with config.json, received none; add the model's own, "
            "or use kind: python with a function that builds it (model_class: module:name)"
        )
    elif is_of_diffusers(base.config):
        _check_kinds(str(base.config["_class_name"]), sections)
        diffusers_class(base.config, base.path)
    else:
        _check_auto_class(model_class, base, sections, whose)


def _check_named(model_class: str, sections: Sequence[Any]) -> None:
    """Refuse a function that builds the model, unless a section imports it."""
    if any(model_class in getattr(section, "references", ()) for section in sections):
        return
    raise InputError(
        f"{_key(sections, model_class)}: expected an auto class of transformers, received "
        f"{model_class!r}; a function that builds the model is for kind: python"
    )


def _check_kinds(name: str, sections: Sequence[Any]) -> None:
    """Refuse evaluators that read what models of transformers answer."""
    for index, section in enumerate(sections):
        if not getattr(section, "any_library", True):
            raise InputError(
                f"evaluators.{index}.kind: expected an evaluator of the base's {name} of "
                f"diffusers, received {section.kind}, which runs models of transformers; use "
                "kind: python, command or distance"
            )


def _check_auto_class(
    model_class: str, base: Checkpoint, sections: Sequence[Any], whose: str
) -> None:
    """Refuse an auto class that does not load the type of a model."""
    model_type = base.config.get("model_type")
    if surely_loads(model_class, str(model_type)):
        return
    from transformers import CONFIG_MAPPING, __version__

    from mergesearch.merging.models.model_classes import auto_class, auto_classes, loads

    key = _key(sections, model_class)
    try:
        auto_class(model_class)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{base.path}: config.json: expected a model_type of transformers {__version__}, "
            f"received {model_type!r}; update transformers, or use kind: python with a function "
            "that builds the model (model_class: module:name)"
        )
    if not loads(model_class, str(model_type)):
        known = " or ".join(auto_classes(base.config)[:NAMED])
        raise InputError(
            f"{key}: expected a class that loads {whose}, which is of type {model_type}, received "
            f"{model_class}; use {known}"
        )


def _key(sections: Sequence[Any], model_class: str) -> str:
    """Key of the study file that chose the class."""
    named = (n for n, s in enumerate(sections) if getattr(s, "model_class", None) == model_class)
    index = next(named, None)
    return "evaluators.0.kind" if index is None else f"evaluators.{index}.model_class"
