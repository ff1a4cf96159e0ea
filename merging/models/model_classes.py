"""The class that loads a checkpoint: an auto class of transformers, or a class of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.extensions.heavy_imports import fast_imports
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.shown import name_shown, path_shown


def auto_class(model_class: str) -> Any:
    """An auto class of ``transformers`` by its name.

    Raises:
        InputError: If there is none.
    """
    with fast_imports():
        import transformers

        auto = getattr(transformers, model_class, None)
    if not model_class.startswith("AutoModel") or not hasattr(auto, "from_pretrained"):
        raise InputError(
            "model class: expected a transformers auto class (AutoModel...), received "
            f"{model_class!r}"
        )
    return auto


def loads(model_class: str, model_type: str) -> bool:
    """Whether an auto class has a model for configurations of a type that ``transformers`` knows.

    Raises:
        InputError: If there is no such auto class.
    """
    with fast_imports():
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[model_type] in auto_class(model_class)._model_mapping


def loads_as(model_class: str, config: Mapping[str, Any]) -> str | None:
    """Name of the class that an auto class makes of a configuration, None where it has none."""
    model_type = str(config.get("model_type"))
    with fast_imports():
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING or not loads(model_class, model_type):
            return None
        made = auto_class(model_class)._model_mapping[CONFIG_MAPPING[model_type]]
    names = made if isinstance(made, list | tuple) else [made]
    return str(names[0].__name__)


def auto_classes(config: Mapping[str, Any]) -> list[str]:
    """Names of the auto classes that load a configuration; those of its own class, if there are."""
    import transformers

    model_type = str(config.get("model_type"))
    names = sorted(name for name in dir(transformers) if name.startswith("AutoModelFor"))
    able = [name for name in names if loads(name, model_type)]
    own = {str(name) for name in config.get("architectures") or ()}
    return [name for name in able if loads_as(name, config) in own] or able or ["AutoModel"]


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a model of diffusers."""
    return "_class_name" in config and "model_type" not in config


def diffusers_class(config: Mapping[str, Any], path: str) -> Any:
    """The class of diffusers that a configuration names.

    Args:
        config: The configuration of a model of diffusers.
        path: Of the checkpoint, for messages.

    Raises:
        CheckpointError: If diffusers is not installed, or has no such model.
    """
    name = str(config["_class_name"])
    otherwise = "or use kind: python with a function that builds it (model_class: module:name)"
    try:
        library: Any = import_module("diffusers")
    except ImportError as error:
        raise CheckpointError(
            f"{path_shown(path)}: expected diffusers to be installed, which has its "
            f"{name_shown(name)}, received {type(error).__name__}: {error}; pip install "
            f"diffusers, {otherwise}"
        ) from None
    with library_errors(
        path_shown(path), f"a model of diffusers {library.__version__}", CheckpointError
    ):
        found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, library.ModelMixin)):
        raise CheckpointError(
            f"{path_shown(path)}: expected a model of diffusers {library.__version__}, received "
            f"{name_shown(name)}; install the version that wrote the folder, {otherwise}"
        )
    return found
