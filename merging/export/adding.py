"""One more expert for a finished OPCM merge, from the merge alone.

A merge is *continued*: its weights, the number of experts that it holds and one factor are all that
the next step of OPCM needs (:mod:`mergesearch.merging.operators.opcm_add`), so that time and memory
do not depend on how many there were. The number and the factor lie beside the weights in
``continual.json``; where they are missing they are worked out once from the recipe and its experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.checkpoints.locations import short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.export.content import recorded_content
from mergesearch.merging.export.folder import Export, export_model
from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.own_json import read_own_json, with_checksum
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import path_shown, shown
from mergesearch.merging.operators import TensorSource, opcm, opcm_add
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.source import FilteredSource

#: What a merge says of itself beside its weights.
FILE = "continual.json"
#: Name of the finished merge among the sources of the next.
MERGED = "merged"
#: Hyperparameters that all steps share.
_SHARED = ("alpha", "matrices", "conv", "fused")


@dataclass(frozen=True)
class Continued:
    """A finished merge, as far as the next step needs to know it.

    Attributes:
        base: The base that all experts come from.
        joined: Number of experts in the merge.
        factor: By which the sum of their cleaned task vectors was scaled.
        options: The hyperparameters that all steps share.
        special: Policies for special tensors, as in recipes.
    """

    base: Source
    joined: int
    factor: float
    options: Mapping[str, Any]
    special: tuple[tuple[str, Any], ...] = ()


def continued(folder: Path, base: str | None = None) -> Continued:
    """What is known of a finished merge.

    Args:
        folder: Its folder: an OPCM merge, or a single expert to begin with.
        base: The base of an expert, which has no recipe that names it.

    Raises:
        InputError: If there is a recipe and a base, or neither.
        RecipeError: If the recipe is of another operator, or of other coefficients than 1.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        if base is None:
            raise InputError(
                f"{path_shown(folder)}: expected recipe.yaml of a merge, received none; give "
                "--base to begin with an expert"
            )
        options = _defaults()
        return Continued(Source("base", base), 1, 1.0, options)
    recipe = load_recipe(path)
    if base is not None:
        raise InputError(
            f"--base: expected none, as {path_shown(path)} names it, received {shown(base)}"
        )
    _check_weights(folder, path)
    known = _recorded(folder)
    options = {name: recipe.options.get(name, value) for name, value in _defaults().items()}
    _check_merge(recipe, path)
    joined, factor = _worked_out(recipe, options) if known is None else known
    return Continued(recipe.base, joined, factor, options, recipe.special)


def next_recipe(merge: Continued, folder: Path, expert: str, name: str | None = None) -> Recipe:
    """The recipe of a finished merge and one more expert.

    Args:
        merge: What is known of the merge.
        folder: Where it lies.
        expert: The expert.
        name: Its name; None for the last part of its path.

    Raises:
        InputError: If its name is that of the merge or of the base.
        CheckpointError: If a source cannot be opened, or does not fit the base.
    """
    called = name or short_name(expert)
    if called in (MERGED, merge.base.name):
        raise InputError(
            f"--name: expected another name than {MERGED!r} and {merge.base.name!r}, received "
            f"{shown(called)}"
        )
    options = {**merge.options, "joined": merge.joined, "factor": merge.factor}
    recipe = Recipe(
        base=merge.base,
        experts=(Source(MERGED, str(resolved(folder))), Source(called, expert)),
        operator=opcm_add.OPCM_ADD.name,
        field=Field.constant(1, [1.0, 1.0]),
        hyperparameters=tuple(sorted(opcm_add.OPCM_ADD.complete(options).items())),
        special=merge.special,
    )
    layout = open_family(recipe).layout
    return Recipe(
        **{
            **vars(recipe),
            "field": Field.constant(layout.size, [1.0, 1.0]),
            "layout": layout.digest,
        }
    )


def export_next(recipe: Recipe, out: Path, **storing: Any) -> Export:
    """Write the merge of :func:`next_recipe`, with what the step after it needs to know.

    Args:
        recipe: Of the merge and one more expert.
        out: Folder to create.
        **storing: As for :func:`mergesearch.merging.export.folder.export_model`.
    """
    resolved(out).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".add-", dir=resolved(out).parent) as kept:
        memo = Memo(Path(kept))
        family = open_family(recipe, memo)
        factor = _factor_of(recipe, family)
        exported = export_model(recipe, out, memo=memo, **storing)
    content = recorded_content(out / "recipe.yaml")
    assert content is not None  # just written
    record = {
        "joined": recipe.options["joined"] + 1,
        "factor": factor,
        "weights": content.weights,
    }
    write_atomically(out / FILE, json.dumps(with_checksum(record), indent=1) + "\n")
    return exported


def _defaults() -> dict[str, Any]:
    complete = opcm_add.OPCM_ADD.complete({})
    return {name: complete[name] for name in _SHARED}


def _check_weights(folder: Path, path: Path) -> None:
    """Refuse weights that are not those that the recipe was written with."""
    content = recorded_content(path)
    current = open_checkpoint(str(folder)).fingerprint()
    if content is not None and content.weights != current:
        raise RecipeError(
            f"{path_shown(folder)}: expected weights {content.weights[:12]}, received "
            f"{current[:12]}; they changed since the merge was written, write it again"
        )


def _check_merge(recipe: Recipe, path: Path) -> None:
    """Refuse merges that are no steps of OPCM."""
    names = (opcm.OPCM.name, opcm_add.OPCM_ADD.name)
    if recipe.operator not in names:
        raise RecipeError(
            f"{path_shown(path)}: expected a merge by {names[0]} or {names[1]}, received "
            f"{shown(recipe.operator)}; merge these experts by {names[0]} first"
        )
    if not bool((recipe.field.values == 1.0).all()):
        raise RecipeError(
            f"{path_shown(path)}: expected coefficients of 1, by which OPCM can be continued, "
            "received others; merge these experts again with coefficients: 1"
        )


def _recorded(folder: Path) -> tuple[int, float] | None:
    """Number of experts and factor beside the weights; None where they are missing or of others."""
    data = read_own_json(folder / FILE)
    if data is None:
        return None
    node = Node(data, path_shown(folder / FILE), InputError)
    joined = node.at("joined").integer(at_least=1)
    factor = node.at("factor").number()
    content = recorded_content(folder / "recipe.yaml")
    same = content is not None and content.weights == node.at("weights").text()
    return (joined, factor) if same and factor > 0 else None


def _worked_out(recipe: Recipe, options: Mapping[str, Any]) -> tuple[int, float]:
    """Number of experts and factor, from the sources of the merge; each is read once."""
    family = open_family(recipe)
    if recipe.operator == opcm_add.OPCM_ADD.name:
        return recipe.options["joined"] + 1, _factor_of(recipe, family)
    base, *experts = _views(family)
    factor = opcm.factor_of(base, experts, order=recipe.options["order"], **options)
    return len(experts), factor


def _factor_of(recipe: Recipe, family: ModelFamily) -> float:
    """The factor of a merge by :data:`OPCM_ADD`."""
    options = opcm_add.OPCM_ADD.complete(recipe.options)
    base, *sources = _views(family)
    return opcm_add.factor_after(base, sources, **options)


def _views(family: ModelFamily) -> list[TensorSource]:
    """Base and experts as operators see them: without running statistics."""
    sources = [family.base, *family.experts]
    hidden = family.special.statistics & {*family.base.names}
    return [FilteredSource(source, hidden) for source in sources] if hidden else [*sources]
