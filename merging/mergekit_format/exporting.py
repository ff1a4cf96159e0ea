"""A merge as mergekit's configuration, where mergekit computes the same up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mergesearch.merging.checkpoints.locations import is_hub_name, split_path
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.coefficients import rows_by_tensor
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.mergekit_format.architectures import ARCHITECTURES
from mergesearch.merging.mergekit_format.methods import CLOSE
from mergesearch.merging.mergekit_format.values import Floats
from mergesearch.merging.mergekit_format.writing_settings import setting_of
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators.model_stock import interpolation_ratio
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.magnitudes import count_kept
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.layout import Layout

#: Name of the file beside an export.
FILE = "mergekit_config.yml"
_HEADER = (
    "# The merge of recipe.yaml for mergekit, which gives the same weights up to rounding:\n"
    f"# mergekit-yaml {FILE} OUT\n"
)


class NotExpressible(Exception):
    """Why mergekit cannot make a merge; its text is one line."""


@dataclass(frozen=True)
class _Form:
    """A merge in the terms of mergekit.

    Attributes:
        method: Name of the merge method.
        weights: Weight of every expert ``(tensors, experts)``; None for methods without weights.
        base: Weight of the base ``(tensors,)``, where it is one of the models.
        shared: Parameters of all models: numbers, or values of tensors ``(tensors,)``.
        rest: Parameter -> its value where no filter gives another.
    """

    method: str
    weights: Floats | None = None
    base: Floats | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Merge:
    """What a form is made from: coefficients ``(tensors, experts)`` and all hyperparameters."""

    rows: Floats
    options: Mapping[str, Any]
    family: ModelFamily

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self.family.layout


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
    make = _FORMS.get(recipe.operator)
    if make is None:
        raise NotExpressible(f"operator {recipe.operator} has no counterpart")
    rows = rows_by_tensor(recipe.field, family.layout)
    if rows is None:
        raise NotExpressible("coefficients vary inside tensors")
    options = get_operator(recipe.operator).complete(recipe.options)
    merge = _Merge(np.array([rows[name] for name in family.layout.names]), options, family)
    if merge.rows.shape[1] != len(recipe.experts):
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


def _data(form: _Form, recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
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


# ----------------------------------------------------------------------------
# Operators, each in the terms of mergekit
# ----------------------------------------------------------------------------


def _average(merge: _Merge) -> _Form:
    # The base is one more ingredient, with what the experts leave of 1.
    base = 1.0 - merge.rows.sum(axis=1)
    base[np.abs(base) < CLOSE] = 0.0
    return _Form("linear", merge.rows, base, {"normalize": False})


def _task_arithmetic(merge: _Merge) -> _Form:
    return _Form("task_arithmetic", merge.rows, shared={"normalize": False})


def _slerp(merge: _Merge) -> _Form:
    return _Form("slerp", shared={"t": merge.rows[:, 0]})


def _ties(merge: _Merge) -> _Form:
    density = merge.options["density"]
    if density < 1 and (merge.options["scope"] != "tensor" or merge.options["vectors"] != "trim"):
        raise NotExpressible("it trims every tensor by itself (scope: tensor, vectors: trim)")
    return _with_density(_elected("ties", merge), merge)


def _dare(merge: _Merge) -> _Form:
    _refuse_masks(merge.options["drop"] > 0)
    return _Form("dare_linear", merge.rows, shared={"density": 1.0, "normalize": False})


def _dare_ties(merge: _Merge) -> _Form:
    _refuse_masks(merge.options["drop"] > 0)
    return _with(_elected("dare_ties", merge), density=1.0)


def _della_linear(merge: _Merge) -> _Form:
    _refuse_masks(merge.options["density"] < 1)
    return _Form("della_linear", merge.rows, shared={"density": 1.0, "normalize": False})


def _della(merge: _Merge) -> _Form:
    _refuse_masks(merge.options["density"] < 1)
    return _with(_elected("della", merge), density=1.0)


def _refuse_masks(random: bool) -> None:
    if random:
        raise NotExpressible("masks are random, and its generator draws others")


def _breadcrumbs(merge: _Merge) -> _Form:
    options = merge.options
    if options["density"] < 1:
        if options["scope"] != "tensor" or options["vectors"] != "trim":
            raise NotExpressible("it thins every tensor by itself (scope: tensor, vectors: trim)")
        if any(not spec.shape for spec in merge.layout.tensors):
            raise NotExpressible("it drops tensors without dimensions")
        _check_outliers(merge)
    form = _Form("breadcrumbs", merge.rows, shared={"normalize": False})
    if options["elect"]:
        form = _elected("breadcrumbs_ties", merge)
    return _with_density(_with(form, gamma=options["gamma"]), merge)


def _check_outliers(merge: _Merge) -> None:
    gamma = merge.options["gamma"]
    for spec in merge.layout.tensors:
        if int(gamma * spec.size) != int(Fraction(repr(float(gamma))) * spec.size):
            raise NotExpressible(f"it rounds gamma {gamma} times {spec.size} elements down twice")


def _model_stock(merge: _Merge) -> _Form:
    if (merge.rows != 1).any():
        raise NotExpressible("its Model Stock has no coefficients, and these are not 1")
    if merge.rows.shape[1] < 2:
        raise NotExpressible("its Model Stock needs two experts")
    experts = merge.family.experts
    for name in merge.layout.names:
        vectors = task_vectors(merge.family.base, experts, name)
        lengths = [dot(vector, vector) ** 0.5 for vector in vectors]
        products = [one * other for one, other in combinations(lengths, 2) if one * other > 0]
        if products and interpolation_ratio(vectors) <= 0:
            raise NotExpressible(f"it extrapolates where experts oppose each other, as at {name}")
        if products and min(products) < 1e-6:
            raise NotExpressible(f"it takes small changes as unrelated, as at {name}")
    return _Form("model_stock", shared={"filter_wise": False})


def _sce(_merge: _Merge) -> _Form:
    raise NotExpressible("it weighs experts alike where their changes are small")


def _elected(method: str, merge: _Merge) -> _Form:
    """Terms of the elected sign; mergekit elects it after weights have been applied."""
    kind = merge.options.get("merge", "mean")
    live = merge.options.get("mode") == "live"
    rows = merge.rows
    equal = bool((rows == rows[:, :1]).all())
    if kind == "sum" and (live or equal):
        return _Form(method, rows, shared={"normalize": False})
    if kind == "weighted_mean" and (rows >= 0).all():
        return _Form(method, rows, shared={"normalize": True})
    if kind == "mean" and not live and equal:
        # λ times the mean of what agrees
        shared = {"normalize": True, "lambda": rows[:, 0]}
        return _Form(method, np.ones_like(rows), shared=shared)
    raise NotExpressible(
        f"it elects signs after weights, which is another merge with merge: {kind} and unequal or "
        "negative coefficients"
    )


def _with_density(form: _Form, merge: _Merge) -> _Form:
    """A form with the densities at which mergekit, which rounds counts down, keeps as many."""
    density = float(merge.options["density"])
    values = np.array([_same_count(density, spec.size) for spec in merge.layout.tensors])
    return replace(_with(form, density=values), rest={"density": density})


def _same_count(density: float, size: int) -> float:
    kept = count_kept(density, size) if size else 0
    if density >= 1 or int(density * size) == kept:
        return float(density)
    return 1.0 if kept >= size else (kept + 0.5) / size


def _with(form: _Form, **shared: Any) -> _Form:
    return replace(form, shared={**form.shared, **shared})


_FORMS: Mapping[str, Callable[[_Merge], _Form]] = {
    "average": _average,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "della_linear": _della_linear,
    "della": _della,
    "breadcrumbs": _breadcrumbs,
    "model_stock": _model_stock,
    "sce": _sce,
}
