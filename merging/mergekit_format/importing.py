"""A mergekit configuration as a recipe in our shorthand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.locations import absolute_path, short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.coefficients import Groups, field_of, written_coefficients
from mergesearch.merging.errors import InputError, did_you_mean
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.mergekit_format.methods import METHODS, OTHERS, Converted, Method
from mergesearch.merging.mergekit_format.patterns import pattern_groupings
from mergesearch.merging.mergekit_format.places import all_settings, needs_tensors, places_of
from mergesearch.merging.mergekit_format.reading import MergekitFile, read_mergekit
from mergesearch.merging.mergekit_format.settings import Place
from mergesearch.merging.mergekit_format.values import Values
from mergesearch.merging.operators import get_operator
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import FLOATING, Layout


@dataclass(frozen=True)
class Imported:
    """What a mergekit configuration is here.

    Attributes:
        recipe: The recipe in the shorthand.
        problems: What it does not say though the file does, one line for each key.
        notes: Where the same merge differs in detail, one line each.
        dtype: What weights are to be stored in; None for the base's own.
        file: The configuration, with the paths of its models made absolute.
    """

    recipe: dict[str, Any]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    dtype: str | None
    file: MergekitFile


def import_mergekit(path: Path, groupings_of: Callable[[Layout], Sequence[Groups]]) -> Imported:
    """Read a mergekit configuration as a recipe.

    The headers of the base are opened only where parameters differ between tensors.

    Args:
        path: The file; paths of models start at its folder, or else at the working directory.
        groupings_of: Ways to divide tensors into groups, by which coefficients are written.

    Raises:
        InputError: If the file is no such configuration, or its method has no counterpart.
        CheckpointError: If the base cannot be opened.
    """
    file = _located(read_mergekit(path), path.parent)
    method = _method(file, path)
    file, experts = _base_and_experts(file, method, path)
    problems = list(file.problems)
    _check_parameters(file, method, problems)
    layout = layout_of(open_checkpoint(_base(file))) if needs_tensors(file) else None
    places = (Place(""),) if layout is None else places_of(file, layout, problems)
    converted = method.convert(Values(file, places, experts, problems))
    names = _names(experts)
    recipe = {
        "base": _base(file),
        "experts": dict(zip(names, experts, strict=True)),
        "operator": converted.operator,
        "hyperparameters": dict(converted.options),
        "special": _special(file, problems),
        "coefficients": _coefficients(converted, layout, names, file, groupings_of),
    }
    recipe = {key: value for key, value in recipe.items() if value != {}}
    if not problems:
        get_operator(converted.operator).complete(converted.options)
    dtype = _dtype(file, problems)
    return Imported(recipe, tuple(dict.fromkeys(problems)), converted.notes, dtype, file)


def _located(file: MergekitFile, folder: Path) -> MergekitFile:
    """The file with local paths made absolute."""

    def place(model: str) -> str:
        here = absolute_path(model, folder)
        return here if here != model else absolute_path(model, Path.cwd())

    slices = [
        replace(one, inputs=tuple(replace(each, model=place(each.model)) for each in one.inputs))
        for one in file.slices
    ]
    base = None if file.base is None else place(file.base)
    tokenizer = file.tokenizer
    if tokenizer not in (None, "base", "union"):
        tokenizer = place(tokenizer)
    return replace(file, base=base, slices=tuple(slices), tokenizer=tokenizer)


def _method(file: MergekitFile, path: Path) -> Method:
    if file.method in METHODS:
        return METHODS[file.method]
    reason = OTHERS.get(file.method)
    hint = (
        f"{reason}; known: {', '.join(METHODS)}" if reason else did_you_mean(file.method, METHODS)
    )
    raise InputError(
        f"{path}: merge_method: expected one that has a counterpart, received "
        f"{shown(file.method)}: {hint}"
    )


def _base_and_experts(
    file: MergekitFile, method: Method, path: Path
) -> tuple[MergekitFile, tuple[str, ...]]:
    """The file with a base, and the models beside it.

    Raises:
        InputError: If there is no base or no model, or there are too many.
    """
    if file.base is None:
        if method.base:
            raise InputError(
                f"{path}: base_model: expected a model for {file.method}, received none"
            )
        # All models are alike, and coefficients are relative to one of them.
        file = replace(file, base=file.models[0])
    experts = file.models
    least, most = method.experts
    if len(experts) < least or (most is not None and len(experts) > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise InputError(
            f"{path}: models: expected {wanted} beside {file.base} for {file.method}, received "
            f"{len(experts)}"
        )
    return file, experts


def _base(file: MergekitFile) -> str:
    assert file.base is not None
    return file.base


def _check_parameters(file: MergekitFile, method: Method, problems: list[str]) -> None:
    for name in sorted({name for name, _ in all_settings(file)} - method.parameters):
        problems.append(
            f"parameters.{name_shown(name)}: {file.method} passes over it; "
            f"{did_you_mean(name, method.parameters)}"
        )


def _names(models: Sequence[str]) -> list[str]:
    """Different names of models, by their last parts."""
    names: list[str] = []
    for model in models:
        name = short_name(model)
        same = sum(each == name or each.startswith(f"{name}-") for each in names)
        names.append(f"{name}-{same + 1}" if name in names else name)
    return names


def _special(file: MergekitFile, problems: list[str]) -> Mapping[str, str]:
    """The policy for vocabularies."""
    if file.tokenizer is None:
        return {}
    if file.tokenizer == "union":
        return {"vocabulary": "union"}
    if file.tokenizer not in ("base", file.base):
        problems.append(
            f"tokenizer_source: expected base or union, received {file.tokenizer}; only the base's "
            "tokenizer can be kept"
        )
    return {"vocabulary": "base"}


def _dtype(file: MergekitFile, problems: list[str]) -> str | None:
    if file.stored is None or file.stored in FLOATING:
        return file.stored
    problems.append(
        f"dtype: expected one of {', '.join(sorted(FLOATING))}, received {shown(file.stored)}"
    )
    return None


def _coefficients(
    converted: Converted,
    layout: Layout | None,
    names: Sequence[str],
    file: MergekitFile,
    groupings_of: Callable[[Layout], Sequence[Groups]],
) -> Any:
    """Coefficients as one would write them: one number, by expert, group, filter or tensor."""
    rows = converted.rows.tolist()
    if layout is None:
        layout = Layout.build({"all": ((1,), "float32")})
        return written_coefficients(Field.constant(layout.size, rows[0]), layout, names, ())
    by_tensor = dict(zip(layout.names, rows, strict=True))
    field = field_of(by_tensor, layout, names, len(names), {})
    groupings = [*groupings_of(layout), *pattern_groupings(file, layout.names)]
    return written_coefficients(field, layout, names, groupings)
