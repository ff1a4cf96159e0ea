"""Whether the items of a calibration go by the experts that are merged, known without running any.

``check`` and the reading of recipes ask this; a run would stop at the same things, but later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from mergesearch.merging.errors import InputError, did_you_mean
from mergesearch.merging.foreign.datasets_folder import (
    class_names,
    data_files,
    features_of,
    read_arrow,
)
from mergesearch.merging.foreign.paths import expanded
from mergesearch.merging.foreign.shown import cut, name_shown, path_shown, shown
from mergesearch.merging.models.calibration_prompts import tokenizer_of
from mergesearch.merging.models.calibration_spec import DEFAULTS
from mergesearch.merging.models.model_classes import auto_classes, loads, loads_as
from mergesearch.merging.tensors.source import Options

#: Arguments of which models have one; a class whose ``forward`` lists none of them tells nothing.
_USUAL = frozenset({"input_ids", "pixel_values", "input_values", "input_features"})
_NO_INPUTS = frozenset({"self", "args", "kwargs", "labels", "return_dict", "return_loss"})


def check_experts(options: Options, experts: Sequence[str]) -> None:
    """Refuse a calibration that lacks folders, prompts, classes or a domain of some expert.

    Args:
        options: Hyperparameters of an operator, which may have no calibration.
        experts: Names of the experts.

    Raises:
        InputError: In one line.
    """
    given = options.get("calibration")
    if not isinstance(given, Mapping):
        return
    calibration = {**DEFAULTS, **given}
    for key in ("data", "prompts", "classes"):
        values = calibration.get(key)
        lacking = sorted(set(experts) - set(values)) if isinstance(values, Mapping) else []
        if lacking and "" not in (values or {}):
            raise InputError(
                f"calibration.{key}: expected an entry for every expert, received none for "
                f"{lacking[0]!r}, only for {', '.join(sorted(values or ()))}"
            )
    if "domain" not in calibration:
        return
    data = calibration["data"]
    for expert in experts:
        path = expanded(data.get(expert, data.get("")) if isinstance(data, Mapping) else data)
        split = path / calibration["split"]
        known = domains_in(split, calibration["domain"])
        if known is not None and expert not in known:
            raise lacking_domain(split, expert, known)


def check_model(options: Options, base: Any) -> None:
    """Refuse a calibration whose model or tokenizer cannot be loaded, or lacks an input.

    Args:
        options: Hyperparameters of an operator, which may have no calibration.
        base: The base, a checkpoint.

    Raises:
        InputError: In one line.
    """
    given = options.get("calibration")
    if not isinstance(given, Mapping):
        return
    from transformers import CONFIG_MAPPING

    model_type = base.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return
    name = given["model_class"]
    try:
        fits = loads(name, model_type)
    except InputError as error:
        raise InputError(f"calibration.model_class: {error}") from None
    if not fits:
        raise InputError(
            f"calibration.model_class: expected a class that loads the base, which is of type "
            f"{model_type}, received {name}; use {' or '.join(auto_classes(base.config)[:3])}"
        )
    _check_inputs(given["inputs"], loads_as(name, base.config) or "")
    if "prompts" in given:
        tokenizer_of(given, base)


def _check_inputs(inputs: Mapping[str, str], model: str) -> None:
    """Refuse names that are no arguments of a class of transformers."""
    import transformers

    known = [*signature(getattr(transformers, model).forward).parameters]
    odd = next((name for name in inputs if name not in known), None)
    if odd is not None and _USUAL & {*known}:
        raise InputError(
            f"calibration.inputs: expected arguments of {model}, received {odd!r}; "
            f"{did_you_mean(odd, {*known} - _NO_INPUTS)}"
        )


def lacking_domain(folder: Path, expert: str, known: Sequence[str]) -> InputError:
    """The error of an expert without items in a split that has those of ``known`` domains."""
    return InputError(
        f"calibration.domain: {path_shown(folder)}: expected items of domain {expert!r}, the name "
        f"of an expert, received only those of {cut(', '.join(map(name_shown, known)), 100)}; name "
        "experts after domains, or give each a folder in calibration.data"
    )


def domains_in(folder: Path, column: str) -> list[str] | None:
    """Names in a column of a split that ``save_to_disk`` wrote, from its files alone.

    None where there is no such split or column, which operators that need it refuse themselves.
    """
    try:
        about = features_of(folder).get(column)
        names = class_names(folder).get(column)
        files = data_files(folder) if isinstance(about, dict) else []
    except InputError:
        return None
    if not isinstance(about, dict):
        return None
    found: set[Any] = set()
    for file in files:
        table = read_arrow(file)
        if column not in table.column_names:
            return None
        found |= {*map(_hashable, table.column(column).unique().to_pylist())}
    odd = next((name for name in found if names is not None and not _is_class(name, names)), None)
    if odd is not None:
        raise InputError(
            f"calibration.domain: {path_shown(folder)}: expected class numbers below "
            f"{len(names or ())} in column {shown(column)}, received {shown(odd)}"
        )
    return sorted(str(name if names is None else names[name]) for name in found)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


def _is_class(number: Any, names: Sequence[str]) -> bool:
    return isinstance(number, int) and 0 <= number < len(names)
