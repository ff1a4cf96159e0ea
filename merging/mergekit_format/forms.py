"""Operators in the terms of mergekit, where it computes the same up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.mergekit_format.methods import CLOSE
from mergesearch.merging.mergekit_format.values import Floats
from mergesearch.merging.operators.layer_swap import swap_source
from mergesearch.merging.operators.lines import depth_scales
from mergesearch.merging.operators.model_stock import interpolation_ratio
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.magnitudes import count_kept
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.operators.sce import most_varying, variance_across
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.roles import block_axes, roles_of

if TYPE_CHECKING:
    import torch

#: mergekit's SCE weighs experts alike below this sum of mean squared changes, and takes no sum of
#: weights below this share; a little more, for what sums round.
SMALL_ENERGY = 1.001e-6
SMALL_SHARE = 1.001e-6
#: Variances so close, relatively, may be in another order in other arithmetic.
CLOSE_VARIANCES = 1e-5


class NotExpressible(Exception):
    """Why mergekit cannot make a merge; its text is one line."""


@dataclass(frozen=True)
class Form:
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
class Merge:
    """What a form is made from: coefficients ``(tensors, experts)`` and all hyperparameters."""

    rows: Floats
    options: Mapping[str, Any]
    family: ModelFamily

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self.family.layout


def _average(merge: Merge) -> Form:
    # The base is one more ingredient, with what the experts leave of 1.
    base = 1.0 - merge.rows.sum(axis=1)
    base[np.abs(base) < CLOSE] = 0.0
    return Form("linear", merge.rows, base, {"normalize": False})


def _task_arithmetic(merge: Merge) -> Form:
    return Form("task_arithmetic", merge.rows, shared={"normalize": False})


def _slerp(merge: Merge) -> Form:
    return Form("slerp", shared={"t": merge.rows[:, 0]})


def _ties(merge: Merge) -> Form:
    density = merge.options["density"]
    if density < 1 and (merge.options["scope"] != "tensor" or merge.options["vectors"] != "trim"):
        raise NotExpressible("it trims every tensor by itself (scope: tensor, vectors: trim)")
    return _with_density(_elected("ties", merge), merge)


def _dare(merge: Merge) -> Form:
    _refuse_dropping(merge)
    return Form("dare_linear", merge.rows, shared={"density": 1.0, "normalize": False})


def _dare_ties(merge: Merge) -> Form:
    _refuse_dropping(merge)
    return _with(_elected("dare_ties", merge), density=1.0)


def _della_linear(merge: Merge) -> Form:
    _refuse_masks(merge.options["density"] < 1)
    return Form("della_linear", merge.rows, shared={"density": 1.0, "normalize": False})


def _della(merge: Merge) -> Form:
    _refuse_masks(merge.options["density"] < 1)
    return _with(_elected("della", merge), density=1.0)


def _refuse_dropping(merge: Merge) -> None:
    _refuse_masks(merge.options["drop"] > 0)
    if merge.options["density"] < 1:
        raise NotExpressible("it does not trim after dropping")


def _refuse_masks(random: bool) -> None:
    if random:
        raise NotExpressible("masks are random, and its generator draws others")


def _breadcrumbs(merge: Merge) -> Form:
    options = merge.options
    if options["density"] < 1:
        if options["scope"] != "tensor" or options["vectors"] != "trim":
            raise NotExpressible("it thins every tensor by itself (scope: tensor, vectors: trim)")
        if any(not spec.shape for spec in merge.layout.tensors):
            raise NotExpressible("it drops tensors without dimensions")
        _check_outliers(merge)
    form = Form("breadcrumbs", merge.rows, shared={"normalize": False})
    if options["elect"]:
        form = _elected("breadcrumbs_ties", merge)
    return _with_density(_with(form, gamma=options["gamma"]), merge)


def _check_outliers(merge: Merge) -> None:
    gamma = merge.options["gamma"]
    for spec in merge.layout.tensors:
        if int(gamma * spec.size) != int(Fraction(repr(float(gamma))) * spec.size):
            raise NotExpressible(f"it rounds gamma {gamma} times {spec.size} elements down twice")


def _model_stock(merge: Merge) -> Form:
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
    return Form("model_stock", shared={"filter_wise": False})


def _lines(merge: Merge) -> Form:
    # Task arithmetic whose weights grow with depth.
    names = merge.layout.names
    scales = depth_scales(names, merge.rows.shape[1], merge.options["alpha"], merge.options["beta"])
    rows = merge.rows * np.array([[scales[name]] for name in names])
    return Form("task_arithmetic", rows, shared={"normalize": False})


def _layer_swap(merge: Merge) -> Form:
    # Every tensor is base + c (x - base) with x of one expert, of both alike or of the base.
    roles = roles_of(merge.layout.names)
    axes = block_axes(roles.values())
    options = merge.options
    shares = {"first": (1.0, 0.0), "second": (0.0, 1.0), "both": (0.5, 0.5), "base": (0.0, 0.0)}
    origins = [
        swap_source(
            roles[name],
            axes,
            options["bottom"],
            options["top"],
            options["transition"],
            options["outside"],
        )
        for name in merge.layout.names
    ]
    rows = merge.rows * np.array([shares[origin] for origin in origins])
    return Form("linear", rows, 1.0 - rows.sum(axis=1), {"normalize": False})


def _sce(merge: Merge) -> Form:
    topk = float(merge.options["topk"])
    if (merge.rows != 1).any():
        raise NotExpressible("its SCE has no coefficients, and these are not 1")
    if topk < 1 and merge.options["select_applies_to"] != "deltas":
        raise NotExpressible("it merges selected positions alone (select_applies_to: deltas)")
    densities = [_sce_density(merge, name, topk) for name in merge.layout.names]
    rest = {"select_topk": topk} if topk < 1 else {}
    return Form("sce", shared={"select_topk": np.array(densities)}, rest=rest)


def _sce_density(merge: Merge, name: str, topk: float) -> float:
    """The density at which mergekit selects the same positions of a tensor.

    Raises:
        NotExpressible: If it would weigh or elect otherwise.
    """
    vectors = task_vectors(merge.family.base, merge.family.experts, name)
    density = 1.0
    if topk < 1:
        variance = variance_across(vectors)
        density = _sure_density(variance, topk, name)
        if ((variance == 0) & (vectors[0] != 0)).any():
            raise NotExpressible(f"it may select where experts agree, as at {name}")
        vectors = [vector * most_varying(vectors, topk, name) for vector in vectors]
    energies = [dot(vector, vector) / max(vector.numel(), 1) for vector in vectors]
    total = sum(energies)
    if min(energies) < max(energies) and total < SMALL_ENERGY:
        raise NotExpressible(f"it weighs experts alike where their changes are small, as at {name}")
    if any(0 < energy < SMALL_SHARE * total for energy in energies):
        raise NotExpressible(f"it bounds the weight of an expert that hardly changes {name}")
    if ((sum(vectors) == 0) & (vectors[0] != 0)).any():
        raise NotExpressible(f"it adds one of two changes that cancel exactly, as at {name}")
    return density


def _sure_density(variance: torch.Tensor, topk: float, name: str) -> float:
    """The density with the same count; refuses variances that rounding could reorder."""
    varying = int(variance.count_nonzero())
    kept = count_kept(topk, varying) if varying else 0
    if 0 < kept < varying:
        largest = variance.flatten().topk(kept + 1).values
        if float(largest[-1]) > (1 - CLOSE_VARIANCES) * float(largest[-2]):
            raise NotExpressible(f"variances are too close to select the same positions of {name}")
    if kept >= varying:
        return 1.0 if varying else topk
    return topk if int(topk * varying) == kept else (kept + 0.5) / varying


def _elected(method: str, merge: Merge) -> Form:
    """Terms of the elected sign; mergekit elects it after weights have been applied."""
    kind = merge.options.get("merge", "mean")
    live = merge.options.get("mode") == "live"
    rows = merge.rows
    equal = bool((rows == rows[:, :1]).all())
    if kind == "sum" and (live or equal):
        return Form(method, rows, shared={"normalize": False})
    if kind == "weighted_mean" and (rows >= 0).all():
        return Form(method, rows, shared={"normalize": True})
    if kind == "mean" and not live and equal:
        # λ times the mean of what agrees
        shared = {"normalize": True, "lambda": rows[:, 0]}
        return Form(method, np.ones_like(rows), shared=shared)
    raise NotExpressible(
        f"it elects signs after weights, which is another merge with merge: {kind} and unequal or "
        "negative coefficients"
    )


def _with_density(form: Form, merge: Merge) -> Form:
    """A form with the densities at which mergekit, which rounds counts down, keeps as many."""
    density = float(merge.options["density"])
    values = np.array([_same_count(density, spec.size) for spec in merge.layout.tensors])
    return replace(_with(form, density=values), rest={"density": density})


def _same_count(density: float, size: int) -> float:
    kept = count_kept(density, size) if size else 0
    if density >= 1 or int(density * size) == kept:
        return float(density)
    return 1.0 if kept >= size else (kept + 0.5) / size


def _with(form: Form, **shared: Any) -> Form:
    return replace(form, shared={**form.shared, **shared})


FORMS: Mapping[str, Callable[[Merge], Form]] = {
    "average": _average,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "della_linear": _della_linear,
    "della": _della,
    "breadcrumbs": _breadcrumbs,
    "lines": _lines,
    "layer_swap": _layer_swap,
    "model_stock": _model_stock,
    "sce": _sce,
}
