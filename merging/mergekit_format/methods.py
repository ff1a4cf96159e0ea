"""mergekit's merge methods as our operators, each with what it says in another way.

A method whose formula is ours up to rounding is one function from its parameters to coefficients
``(tensors, experts)`` and hyperparameters. ``notes`` say where the two differ even so. In the
formulas w are weights and λ the parameter ``lambda``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergesearch.merging.mergekit_format.values import Floats, Values
from mergesearch.merging.operators.parts.election import one_minus

#: How far weights may be from a sum of 1.
CLOSE = 1e-9
_RANDOM = (
    "which elements are dropped is drawn anew: the masks of mergekit depend on the order of tensors"
)
_COUNTS = "here one element more is kept where density times the elements is no whole number"
_CANCELLED = "task vectors that cancel exactly add nothing here, the positive terms in mergekit"


@dataclass(frozen=True)
class Converted:
    """A method as an operator.

    Attributes:
        operator: Name of the operator.
        rows: Coefficients ``(tensors, experts)``.
        options: Hyperparameters.
        notes: Where the two differ, one line each.
    """

    operator: str
    rows: Floats
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A merge method of mergekit.

    Attributes:
        convert: What it is here.
        parameters: Names of the parameters that it has.
        base: Whether it needs a base.
        experts: Least and greatest number of models beside the base; None where there is no limit.
    """

    convert: Callable[[Values], Converted]
    parameters: frozenset[str]
    base: bool = True
    experts: tuple[int, int | None] = (1, None)


def _sum(values: Values, normalize: bool) -> Floats:
    """Coefficients of ``λ Σ w τ``, with ``normalize`` divided by ``Σ w``."""
    weights = values.weights(values.experts)
    if values.constant("normalize", float(normalize)):
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(np.abs(total) < 1e-8, 1.0, total)
    return weights * values.at("lambda", 1.0)[:, None]


def _election(values: Values, normalize: bool) -> tuple[Floats, dict[str, Any]]:
    """Coefficients of terms that have the elected sign, and how they are merged.

    Signs are elected among ``w τ``. Where all weights are equal they are those of ``τ``, elected
    once; else they change with the coefficients.
    """
    weights = values.weights(values.experts)
    scale = values.at("lambda", 1.0)[:, None]
    equal = bool((weights == weights[:, :1]).all() and (weights != 0).all())
    mode = "frozen" if equal else "live"
    if not values.constant("normalize", float(normalize)):
        return weights * scale, {"merge": "sum", "mode": mode}
    if equal:
        return np.ones_like(weights) * scale, {"merge": "mean", "mode": mode}
    if (weights < 0).any() or (scale != 1).any():
        values.problems.append(
            "parameters.lambda: expected 1 and weights of at least 0 where normalized weights "
            "differ; a mean of elected terms has no other factor here"
        )
    return weights, {"merge": "weighted_mean", "mode": mode}


def _no_rescaling(values: Values) -> None:
    if values.constant("rescale", 0.0):
        values.problems.append(
            "parameters.rescale: expected false, received true; trimmed task vectors are not "
            "scaled up here"
        )


def _density(values: Values) -> float:
    return min(1.0, values.common("density", 1.0))


def _norm(values: Values) -> str:
    """How what is left after dropping is rescaled."""
    return "l1" if values.constant("rescale", 1.0) else "none"


def _linear(values: Values) -> Converted:
    # Σ w x / Σ w over all models: the base takes what the experts leave of 1
    base = values.file.base
    assert base is not None
    weights = values.weights([base, *values.experts])
    total = weights.sum(axis=1, keepdims=True)
    normalize = bool(values.constant("normalize", 1.0))
    if (np.abs(total) < CLOSE).any() if normalize else (np.abs(total - 1) > CLOSE).any():
        wanted = "other than 0" if normalize else "of 1 where normalize is false"
        values.problems.append(
            f"weight: expected a sum {wanted}, received {total.min():g} to {total.max():g}; what "
            "is left of 1 stays with the base here"
        )
    safe = np.where(np.abs(total) < CLOSE, 1.0, total)
    return Converted("average", weights[:, 1:] / safe if normalize else weights[:, 1:])


def _task_arithmetic(values: Values) -> Converted:
    return Converted("task_arithmetic", _sum(values, normalize=False))


def _ties(values: Values) -> Converted:
    _no_rescaling(values)
    density = _density(values)
    rows, merging = _election(values, normalize=True)
    options = {"density": density, "scope": "tensor", **merging}
    return Converted("ties", rows, options, (*_kept(density), _CANCELLED))


def _kept(density: float) -> tuple[str, ...]:
    return (_COUNTS,) if density < 1 else ()


def _dare_options(values: Values) -> tuple[dict[str, Any], tuple[str, ...]]:
    drop = one_minus(_density(values))
    if drop == 0:
        return {"drop": 0.0}, ()
    return {"drop": drop, "rescale": _norm(values), "vectors": "drop"}, (_RANDOM,)


def _dare_linear(values: Values) -> Converted:
    options, notes = _dare_options(values)
    return Converted("dare", _sum(values, normalize=False), options, notes)


def _dare_ties(values: Values) -> Converted:
    options, notes = _dare_options(values)
    rows, merging = _election(values, normalize=False)
    return Converted("dare_ties", rows, options | merging, (*notes, _CANCELLED))


def _della_options(values: Values) -> tuple[dict[str, Any], tuple[str, ...]]:
    density = _density(values)
    if density == 1:
        return {"density": 1.0, "epsilon": 0.0}, ()
    epsilon = values.common("epsilon", 0.15)
    options = {"density": density, "epsilon": epsilon, "rescale": _norm(values), "vectors": "drop"}
    return options, (_RANDOM,)


def _della_linear(values: Values) -> Converted:
    options, notes = _della_options(values)
    return Converted("della_linear", _sum(values, normalize=False), options, notes)


def _della(values: Values) -> Converted:
    options, notes = _della_options(values)
    rows, merging = _election(values, normalize=True)
    return Converted("della", rows, options | merging, (*notes, _CANCELLED))


def _crumbs(values: Values) -> tuple[dict[str, Any], tuple[str, ...]]:
    _no_rescaling(values)
    density = _density(values)
    # At density 1 mergekit leaves task vectors whole, outliers included.
    gamma = 0.0 if density == 1 else values.common("gamma", 0.01)
    options = {"density": density, "gamma": gamma, "scope": "tensor", "vectors": "trim"}
    return options, _kept(density)


def _breadcrumbs(values: Values) -> Converted:
    options, notes = _crumbs(values)
    return Converted("breadcrumbs", _sum(values, normalize=False), options, notes)


def _breadcrumbs_ties(values: Values) -> Converted:
    options, notes = _crumbs(values)
    rows, merging = _election(values, normalize=False)
    if merging != {"merge": "mean", "mode": "frozen"}:
        values.problems.append(
            "merge_method: breadcrumbs_ties: expected normalize true and equal weights, received "
            "others; elected breadcrumbs are merged by their mean here"
        )
    return Converted("breadcrumbs", rows, {**options, "elect": True}, (*notes, _CANCELLED))


def _sce(values: Values) -> Converted:
    _all_everywhere(values)
    options = {"topk": values.constant("select_topk", 1.0), "select_applies_to": "deltas"}
    note = "mergekit weighs models alike once their mean squared changes add up to less than 1e-6"
    return Converted("sce", _ones(values), options, (note, _CANCELLED))


def _model_stock(values: Values) -> Converted:
    _all_everywhere(values)
    if values.constant("filter_wise", 0.0):
        values.problems.append(
            "parameters.filter_wise: expected false, received true; angles are those of whole "
            "tensors here"
        )
    note = "where task vectors oppose each other the base is kept here; mergekit goes beyond it"
    return Converted("model_stock", _ones(values), {}, (note,))


def _slerp(values: Values) -> Converted:
    _all_everywhere(values)
    rows = values.at("t")
    if np.isnan(rows).any():
        values.problems.append("parameters.t: expected a value at every tensor, received none")
    return Converted("slerp", np.nan_to_num(rows)[:, None])


def _ones(values: Values) -> Floats:
    return np.ones((values.tensors, len(values.experts)))


def _all_everywhere(values: Values) -> None:
    for model in values.experts:
        if not values.everywhere(model):
            values.problems.append(f"slices: expected {model} in every slice; it has no weight")


_WEIGHTED = frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})

#: Methods by their names in mergekit.
METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, frozenset({"weight", "normalize"}), base=False),
    "task_arithmetic": Method(_task_arithmetic, _WEIGHTED),
    "ties": Method(_ties, _WEIGHTED),
    "dare_linear": Method(_dare_linear, _WEIGHTED),
    "dare_ties": Method(_dare_ties, _WEIGHTED),
    "della_linear": Method(_della_linear, _WEIGHTED | {"epsilon"}),
    "della": Method(_della, _WEIGHTED | {"epsilon"}),
    "breadcrumbs": Method(_breadcrumbs, _WEIGHTED | {"gamma"}),
    "breadcrumbs_ties": Method(_breadcrumbs_ties, _WEIGHTED | {"gamma"}),
    "sce": Method(_sce, frozenset({"select_topk", "int8_mask"})),
    "model_stock": Method(_model_stock, frozenset({"filter_wise"}), experts=(2, None)),
    "slerp": Method(_slerp, frozenset({"t"}), experts=(1, 1)),
}

#: Methods that have no counterpart, and why.
OTHERS: Mapping[str, str] = {
    "passthrough": "it stacks blocks of several models, and a recipe keeps those of the base",
    "nuslerp": "arcs between two experts have no counterpart",
    "multislerp": "barycentres on a sphere have no counterpart",
    "karcher": "barycentres on a sphere have no counterpart",
    "nearswap": "its coefficients depend on every element",
    "arcee_fusion": "its importance scores have no counterpart",
    "ram": "positions that one model changed have no rule of their own here",
    "ramplus_tl": "positions that one model changed have no rule of their own here",
}
