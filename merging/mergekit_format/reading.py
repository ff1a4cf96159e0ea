"""A mergekit configuration as data: what is to be merged, slice by slice.

mergekit passes over keys that it does not know; here they are problems, as they are mistakes more
often than not. What the file says that a recipe cannot say is collected, one line for each key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.merging.errors import InputError, did_you_mean
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.foreign.yaml_text import read_yaml
from mergesearch.merging.mergekit_format.settings import setting_problem

_KEYS = (
    *("models", "slices", "modules", "merge_method", "base_model", "parameters"),
    *("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"),
)
_SLICE_KEYS = ("sources", "base_model", "parameters", "residual_weight")
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """A model of a slice, with parameters of its own."""

    model: str
    parameters: Parameters


@dataclass(frozen=True)
class Slice:
    """An output slice.

    Attributes:
        inputs: Its models.
        layers: Its first block, and one past its last; None for all.
        parameters: Those that its models share.
    """

    inputs: tuple[Input, ...]
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True)
class MergekitFile:
    """What a mergekit configuration says.

    Attributes:
        method: Name of the merge method.
        base: The base model, if it names one.
        slices: The output slices, one for ``models``.
        parameters: Those of the whole merge.
        stored: The dtype that weights are written in, if it is given.
        tokenizer: ``base``, ``union``, a model, or None.
        problems: What cannot be said in a recipe, one line for each key.
    """

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters
    stored: str | None = None
    tokenizer: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def models(self) -> tuple[str, ...]:
        """All models but the base, in the order of the file."""
        named = [each.model for one in self.slices for each in one.inputs]
        return tuple(name for name in dict.fromkeys(named) if name != self.base)


def read_mergekit(path: Path) -> MergekitFile:
    """Read a mergekit configuration.

    Raises:
        InputError: If the file cannot be read, or is no such configuration.
    """
    data = _load(path)
    if not isinstance(data.get("merge_method"), str):
        keys = ", ".join(name_shown(key, 40) for key in list(data)[:8])
        raise InputError(
            f"{path}: expected a mergekit configuration with merge_method, received keys "
            f"{keys or 'none'}"
        )
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        raise InputError(
            f"{path}: expected exactly one of models, slices and modules, received "
            f"{' and '.join(given) or 'none'}"
        )
    problems: list[str] = []
    _check_keys("", data, _KEYS, problems)
    if given == ["modules"]:
        raise InputError(
            f"{path}: modules: expected models or slices, received parts of a model; a recipe says "
            "coefficients by the names of tensors, so write models with filters"
        )
    base = _reference("base_model", data.get("base_model"), path)
    slices = (
        [_models(data["models"], path, problems)]
        if given == ["models"]
        else [
            _slice(i, each, base, path, problems)
            for i, each in enumerate(_rows("slices", data["slices"], path))
        ]
    )
    _named(problems, "chat_template", data.get("chat_template"), "the base's template is kept")
    return MergekitFile(
        method=data["merge_method"],
        base=base,
        slices=tuple(slices),
        parameters=_parameters("parameters", data.get("parameters"), problems),
        stored=_stored(data, path),
        tokenizer=_tokenizer(data, path, problems),
        problems=problems,
    )


def _load(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    where = name_shown(str(path), 200)
    if not isinstance(data, dict):
        raise InputError(
            f"{where}: expected the keys of a mergekit configuration, received {shown(data)}"
        )
    return Node(data, where).mapping()


def _stored(data: Mapping[str, Any], path: Path) -> str | None:
    """The dtype that weights are written in."""
    stored = data.get("out_dtype") or data.get("dtype") or None
    if stored is not None and not isinstance(stored, str):
        raise InputError(f"{path}: dtype: expected its name, received {shown(stored)}")
    return stored


def _models(value: Any, path: Path, problems: list[str]) -> Slice:
    inputs = []
    for i, each in enumerate(_rows("models", value, path)):
        _check_keys(f"models[{i}].", each, ("model", "parameters"), problems)
        inputs.append(_input(f"models[{i}]", each, path, problems))
    return Slice(tuple(inputs), None, {})


def _slice(i: int, value: Any, base: str | None, path: Path, problems: list[str]) -> Slice:
    where = f"slices[{i}]"
    (row,) = _rows(where, [value], path)
    _check_keys(f"{where}.", row, _SLICE_KEYS, problems)
    inputs = []
    ranges = set()
    for k, each in enumerate(_rows(f"{where}.sources", row.get("sources"), path)):
        key = f"{where}.sources[{k}]"
        _check_keys(f"{key}.", each, ("model", "layer_range", "parameters"), problems)
        inputs.append(_input(key, each, path, problems))
        ranges.add(_range(key, each.get("layer_range"), path))
    if len(ranges) != 1:
        problems.append(
            f"{where}.sources: layer_range: expected the same blocks of every model, received "
            f"{', '.join(map(str, sorted(ranges)))}; a recipe keeps every block in its place"
        )
    own = _reference(f"{where}.base_model", row.get("base_model"), path)
    if own not in (None, base):
        problems.append(f"{where}.base_model: a merge has one base, which is {base}")
    _named(problems, f"{where}.residual_weight", row.get("residual_weight"), "it has no meaning")
    parameters = _parameters(f"{where}.parameters", row.get("parameters"), problems)
    return Slice(tuple(inputs), min(ranges), parameters)


def _input(key: str, row: Mapping[str, Any], path: Path, problems: list[str]) -> Input:
    model = _reference(f"{key}.model", row.get("model"), path)
    if model is None:
        raise InputError(f"{path}: {key}.model: expected a model, received none")
    return Input(model, _parameters(f"{key}.parameters", row.get("parameters"), problems))


def _rows(key: str, value: Any, path: Path) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise InputError(f"{path}: {key}: expected a list of mappings, received {shown(value)}")
    if not value:
        raise InputError(f"{path}: {key}: expected at least one model, received none")
    return value


def _range(key: str, value: Any, path: Path) -> tuple[int, int]:
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        and 0 <= value[0] < value[1]
    ):
        return (value[0], value[1])
    raise InputError(
        f"{path}: {key}.layer_range: expected [first, one past the last], received {_few(value)}"
    )


def _few(value: Any) -> str:
    """A short list of numbers as it is written; another value as messages show it."""
    plain = isinstance(value, list) and len(value) <= 4
    return f"[{', '.join(map(shown, value))}]" if plain else shown(value)


def _reference(key: str, value: Any, path: Path) -> str | None:
    """A model as we write it: folder, ``org/name@revision`` or ``MODEL+ADAPTER``."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, Mapping) and set(value) <= {"model", "lora", "override_architecture"}:
        parts = [_place(value[name]) for name in ("model", "lora") if value.get(name)]
        if parts and None not in parts and not value.get("override_architecture"):
            return "+".join(part for part in parts if part)
    raise InputError(f"{path}: {key}: expected a folder or org/name, received {shown(value)}")


def _place(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        revision = value.get("revision")
        return f"{value['path']}@{revision}" if revision else str(value["path"])
    return None


def _parameters(key: str, value: Any, problems: list[str]) -> Parameters:
    """Parameters by name; one that is no setting is a problem, and left out."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{key}: expected a mapping, received {shown(value)}")
        return {}
    good = {}
    for name, setting in value.items():
        reason = setting_problem(setting)
        if reason is None:
            good[str(name)] = setting
        else:
            problems.append(f"{key}.{name_shown(str(name))}: {reason}")
    return good


def _tokenizer(data: Mapping[str, Any], path: Path, problems: list[str]) -> str | None:
    source = data.get("tokenizer_source")
    section = data.get("tokenizer")
    if isinstance(section, Mapping):
        source = section.get("source")
        for name in section:
            if name != "source":
                problems.append(
                    f"tokenizer.{name_shown(str(name))}: rows of tokens are aligned by their text "
                    "alone, and no token has a rule of its own"
                )
    elif section is not None:
        problems.append(f"tokenizer: expected a mapping, received {shown(section)}")
    return _reference("tokenizer_source", source, path)


def _check_keys(
    prefix: str, row: Mapping[str, Any], known: Iterable[str], problems: list[str]
) -> None:
    for key in row:
        if key not in known:
            hint = did_you_mean(str(key), list(known))
            place = f"{prefix}{name_shown(str(key))}"
            problems.append(f"{place}: mergekit passes over this key; {hint}")


def _named(problems: list[str], key: str, value: Any, what: str) -> None:
    if value is not None:
        problems.append(f"{key}: a recipe cannot say it; {what}")
