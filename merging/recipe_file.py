"""Recipes on disk: the exact form, and the shorthand that people write by hand.

The shorthand names checkpoints and says coefficients by expert, group, tensor or pattern
(:mod:`mergesearch.merging.coefficients`)::

    base: zoo/base
    experts: {rotated: zoo/rotated, mirrored: zoo/mirrored}
    operator: task_arithmetic
    coefficients:
      default: 0.3
      block 3: {rotated: 0.4, mirrored: 0.1}

Without coefficients, the operator's default holds. Hyperparameters of the operator go under
``hyperparameters``, policies for vocabularies, running statistics and other special tensors under
``special``. Relative paths start at the recipe's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.checkpoints.locations import absolute_path, is_hub_name, short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.coefficients import Groups, field_of, written_coefficients
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.family.family import align_family
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import name_shown, printable, shown
from mergesearch.merging.foreign.yaml_text import read_yaml
from mergesearch.merging.models.calibration_experts import check_experts
from mergesearch.merging.models.calibration_spec import absolute
from mergesearch.merging.policies import (
    TensorPolicies,
    located_special,
    parse_policies,
    split_options,
)
from mergesearch.merging.recipe import EXPORTED, Recipe, Source
from mergesearch.merging.tensors.layout import Layout

_KEYS = ("base", "experts", "operator", "hyperparameters", "special", "coefficients")
_REQUIRED = ("base", "experts", "operator")
_SUFFIXES = (".yaml", ".yml", ".json")


def load_recipe(path: Path, groups_of: Callable[[Layout], Groups] = lambda layout: {}) -> Recipe:
    """Read a recipe in its exact form (as :meth:`Recipe.to_dict` writes it) or in the shorthand.

    The shorthand opens the base's headers to resolve names; no weight is read.

    Args:
        path: The file.
        groups_of: The groups of tensors that the shorthand may name.

    Raises:
        RecipeError: If the file is missing or malformed, or does not fit the base.
        CheckpointError: If the base of a shorthand recipe cannot be opened.
    """
    data = _read(path)
    where = name_shown(str(path), 200)
    try:
        if "format" in data or "field" in data:
            return located(Recipe.from_dict(data), path.parent)
        return _from_shorthand(data, path.parent, groups_of)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise RecipeError(
            f"{where}: expected a recipe as `mergesearch export` writes it, received: "
            f"{name_shown(str(error), 120)}"
        ) from error


def save_recipe(recipe: Recipe, path: Path, exported: Mapping[str, Any] | None = None) -> None:
    """Write the exact form of a recipe as YAML or JSON, by the suffix.

    The file is replaced in one step: readers see the old one or the new one.

    Args:
        recipe: The merge.
        path: The file.
        exported: What is known of the weights that were written by it.

    Raises:
        RecipeError: If the suffix is neither, or the folder cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise RecipeError(
            f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}, received {path.suffix!r}"
        )
    data = located(recipe, Path.cwd()).to_dict() | ({EXPORTED: dict(exported)} if exported else {})
    text = json.dumps(data, indent=1) if path.suffix == ".json" else _yaml_text(data)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise RecipeError(
            f"{path}: expected a writable place, received: {error.strerror}"
        ) from error


def exported_of(path: Path) -> Any:
    """What a recipe's file says of the weights that were written by it; None where it does not.

    Raises:
        RecipeError: If the file is missing or malformed.
    """
    return _read(path).get(EXPORTED)


def _yaml_text(data: Mapping[str, Any]) -> str:
    # Characters that hide or turn text, and line breaks beyond ASCII, are written as escapes.
    text = json.dumps(data, ensure_ascii=False)
    plain = printable(text) == text
    return yaml.safe_dump(
        data, sort_keys=False, default_flow_style=None, allow_unicode=plain, width=120
    )


def _read(path: Path) -> dict[str, Any]:
    what = "a readable recipe file"
    where = name_shown(str(path), 200)
    if path.suffix == ".json":
        text = read_text(path, error=RecipeError, what=what)
        data = parse_json(text, where, RecipeError, unique=True)
    else:
        data = read_yaml(path, RecipeError, what=what)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected keys {', '.join(_KEYS)}, received {shown(data)}")
    return Node(data, where, RecipeError).mapping()


def shorthand_of(
    recipe: Recipe, layout: Layout, groupings: Sequence[Groups]
) -> dict[str, Any] | None:
    """A recipe as people write it; None where it varies inside a tensor, routes or rounds.

    Args:
        recipe: A merge.
        layout: Its tensors.
        groupings: As in :func:`mergesearch.merging.coefficients.written_coefficients`.
    """
    names = [expert.name for expert in recipe.experts]
    written = written_coefficients(recipe.field, layout, names, groupings)
    if written is None or recipe.routing or recipe.bits or recipe.mixture:
        return None
    optional = {"hyperparameters": recipe.options, "special": dict(recipe.special)}
    return {
        "base": recipe.base.path,
        "experts": {expert.name: expert.path for expert in recipe.experts},
        "operator": recipe.operator,
        **{key: value for key, value in optional.items() if value},
        "coefficients": written,
    }


def recipe_text(data: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return _yaml_text(data)


def _from_shorthand(
    data: Mapping[str, Any], folder: Path, groups_of: Callable[[Layout], Groups]
) -> Recipe:
    from mergesearch.merging.operators import get_operator

    _check_keys(data)
    base = _source("base", data["base"], "", folder)
    located_experts, special = split_options(data["experts"], data.get("special"))
    experts = _experts(located_experts, folder)
    operator = get_operator(_text("operator", data["operator"]))
    options = data.get("hyperparameters") or {}
    if not isinstance(options, dict):
        raise RecipeError(f"hyperparameters: expected a mapping, received {shown(options)}")
    Node(options, "hyperparameters", RecipeError).mapping()
    policies = located_special(
        parse_policies(special), lambda path: _source("special", path, "", folder).path
    )
    layout = _layout(base, experts, policies)
    options = operator.check(layout, len(experts), absolute(options, folder))
    check_experts(options, [expert.name for expert in experts])
    coefficients = data.get("coefficients", operator.default(len(experts), options))
    return Recipe(
        base=base,
        experts=experts,
        operator=data["operator"],
        field=field_of(
            coefficients,
            layout,
            [expert.name for expert in experts],
            operator.directions(len(experts), options),
            groups_of(layout),
        ),
        hyperparameters=tuple(sorted(options.items())),
        layout=layout.digest,
        special=policies.choices,
    )


def _layout(base: Source, experts: Sequence[Source], policies: TensorPolicies) -> Layout:
    """The layout of a merge: that of the base, unless policies change it."""
    origin = open_checkpoint(base.path, base.name)
    if not policies.choices:
        return layout_of(origin)
    return align_family(
        origin, [open_checkpoint(expert.path, expert.name) for expert in experts], policies
    ).layout


def _check_keys(data: Mapping[str, Any]) -> None:
    unknown = [str(key) for key in data if key not in _KEYS]
    if unknown:
        raise RecipeError(
            f"unknown key {', '.join(map(shown, unknown[:8]))}; known keys are {', '.join(_KEYS)}"
        )
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise RecipeError(
            f"missing key {', '.join(map(repr, missing))}; known keys are {', '.join(_KEYS)}"
        )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key}: expected text, received {shown(value)}")
    return value


def _experts(value: Any, folder: Path) -> tuple[Source, ...]:
    if isinstance(value, list):
        sources = [_source(f"experts[{i}]", path, "", folder) for i, path in enumerate(value)]
    elif isinstance(value, dict):
        sources = [
            _source(f"experts.{name_shown(str(name))}", path, str(name), folder)
            for name, path in value.items()
        ]
    else:
        raise RecipeError(
            "experts: expected a list of paths or a mapping of name to path, received "
            f"{shown(value)}"
        )
    if not sources:
        raise RecipeError("experts: expected at least one, received none")
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"experts: expected different names, received {shown(twice)} twice; write "
            "`experts: {name: path}`"
        )
    return tuple(sources)


def _source(key: str, path: Any, name: str, folder: Path) -> Source:
    full = absolute_path(_text(key, path), folder)
    if full == path and not is_hub_name(path):
        full = os.path.abspath(folder / Path(path).expanduser())  # missing: messages say where
    return Source(name or short_name(full), full)


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with local paths, which start at ``folder``, made absolute.

    Names of the hub stay as they are.
    """
    base, *experts = (_absolute(source, folder) for source in (recipe.base, *recipe.experts))
    return replace(recipe, base=base, experts=tuple(experts))


def _absolute(source: Source, folder: Path) -> Source:
    # Analytic problems name sources that are no files at all; those stay as they are.
    return replace(source, path=absolute_path(source.path, folder))
