"""A merge as mergekit's configuration, where mergekit computes the same up to rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mergesearch.merging.checkpoints.locations import is_hub_name, split_path
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.coefficients import rows_by_tensor
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.mergekit_format.architectures import ARCHITECTURES
from mergesearch.merging.mergekit_format.forms import FORMS, Form, Merge, NotExpressible
from mergesearch.merging.mergekit_format.values import Floats
from mergesearch.merging.mergekit_format.writing_settings import setting_of
from mergesearch.merging.operators import get_operator
from mergesearch.merging.recipe import Recipe

__all__ = ["FILE", "NotExpressible", "mergekit_config", "write_mergekit_config"]

#: Name of the file beside an export.
FILE = "mergekit_config.yml"
_HEADER = (
    "# The merge of recipe.yaml for mergekit, which gives the same weights up to rounding:\n"
    f"# mergekit-yaml {FILE} OUT\n"
)


def mergekit_config(recipe: Recipe, family: ModelFamily, dtypes: Collection[str]) -> str:
    """The text of ``mergekit_config.yml``.

    Args:
        recipe: A merge.
        family: Its base and experts.
        dtypes: Those that merged tensors are stored in.

    Raises:
        NotExpressible: If mergekit cannot make this merge.
    """
    _check_family(recipe, family, dtypes)
    make = FORMS.get(recipe.operator)
    if make is None:
        raise NotExpressible(f"operator {recipe.operator} has no counterpart")
    rows = rows_by_tensor(recipe.field, family.layout)
    if rows is None:
        raise NotExpressible("coefficients vary inside tensors")
    options = get_operator(recipe.operator).complete(recipe.options)
    merge = Merge(np.array([rows[name] for name in family.layout.names]), options, family)
    if recipe.operator != "layer_swap" and merge.rows.shape[1] != len(recipe.experts):
        raise NotExpressible("coefficients are not those of experts")
    data = _data(make(merge), recipe, family.layout.names)
    wide = "float64" if "float64" in _source_dtypes(family) else "float32"
    (stored,) = dtypes
    data |= {"dtype": wide} if stored == wide else {"dtype": wide, "out_dtype": stored}
    return _HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def write_mergekit_config(
    recipe: Recipe, family: ModelFamily, stored: Mapping[str, TensorInfo], folder: Path
) -> dict[str, str]:
    """Write ``mergekit_config.yml`` where mergekit can make a merge.

    Args:
        recipe: The merge.
        family: Its base and experts.
        stored: How tensors are stored.
        folder: Where to write.

    Returns:
        A line for the model card: the file, or why there is none.
    """
    try:
        dtypes = {stored[name].dtype for name in family.layout.names}
        text = mergekit_config(recipe, family, dtypes)
    except NotExpressible as reason:
        return {"mergekit": f"cannot make this merge: {reason}"}
    (folder / FILE).write_text(text, encoding="utf-8")
    return {"mergekit": f"{FILE} makes this merge"}


def _check_family(recipe: Recipe, family: ModelFamily, dtypes: Collection[str]) -> None:
    base = family.base
    # Where all vocabularies are the same, a policy for them changes nothing.
    idle = {"vocabulary"} if family.alignment is None else set()
    special = [name for name, _ in recipe.special if name not in idle]
    if special:
        raise NotExpressible(f"special tensors: {', '.join(special)}")
    if recipe.bits:
        raise NotExpressible("its layers are rounded to bits of their own")
    architecture = next(iter(base.config.get("architectures") or ()), None)
    if base.folder is None or architecture is None:
        raise NotExpressible("the base has no config.json with an architecture")
    if architecture not in ARCHITECTURES:
        raise NotExpressible(f"{architecture} is none that it is known to write as it is stored")
    if len(dtypes) != 1:
        raise NotExpressible(f"merged tensors are stored in {' and '.join(sorted(dtypes))}")
    for source in (recipe.base, *recipe.experts):
        if split_path(source.path) is not None:
            raise NotExpressible(f"{source.name} is an adapter, which mergekit rounds first")
        if "@" in source.path and not is_hub_name(source.path):
            raise NotExpressible(f"the path of {source.name} has an @, which means a revision")


def _source_dtypes(family: ModelFamily) -> set[str]:
    return {info.dtype for source in family.sources for info in source.tensors.values()}


def _data(form: Form, recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """A form as the keys of a configuration."""
    models: list[dict[str, Any]] = [{"model": recipe.base.path}]
    if form.base is not None:
        models[0]["parameters"] = {"weight": _setting(names, form.base)}
    for k, expert in enumerate(recipe.experts):
        models.append({"model": expert.path})
        if form.weights is not None:
            models[-1]["parameters"] = {"weight": _setting(names, form.weights[:, k])}
    shared = {
        name: _setting(names, value, form.rest.get(name))
        if isinstance(value, np.ndarray)
        else value
        for name, value in form.shared.items()
    }
    data: dict[str, Any] = {"merge_method": form.method, "base_model": recipe.base.path}
    data |= {"parameters": shared} if shared else {}
    return {**data, "models": models}


def _setting(names: Sequence[str], values: Floats, rest: float | None = None) -> Any:
    setting = setting_of(names, values.tolist(), rest)
    if setting is None:
        raise NotExpressible("names of tensors are parts of each other, so filters cannot tell")
    return setting
