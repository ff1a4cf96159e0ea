"""What mergekit makes of the generated weights. Runs in the peers' environment only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.config import evaluate_setting
from mergekit.merge_methods import PerGroupValues, merge_state_dicts

from tests.peers.case import Case, State
from tests.peers.inputs import BLOCKS, SHAPES

SEED = 7


def linear(
    base: State, experts: Mapping[str, State], *, weight: Sequence[float], normalize: bool
) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="linear")."""
    return merge_state_dicts(
        dict(experts), "linear", parameters={"weight": list(weight), "normalize": normalize}
    )


def task_arithmetic(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="task_arithmetic")."""
    return _around_base("task_arithmetic", base, experts, settings)


def ties(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="ties")."""
    return _around_base("ties", base, experts, settings)


def dare_linear(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="dare_linear")."""
    return _around_base("dare_linear", base, experts, settings)


def dare_ties(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="dare_ties")."""
    return _around_base("dare_ties", base, experts, settings)


def della(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="della")."""
    return _around_base("della", base, experts, settings)


def della_linear(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="della_linear")."""
    return _around_base("della_linear", base, experts, settings)


def breadcrumbs(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="breadcrumbs")."""
    return _around_base("breadcrumbs", base, experts, settings)


def breadcrumbs_ties(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="breadcrumbs_ties")."""
    return _around_base("breadcrumbs_ties", base, experts, settings)


def sce(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="sce")."""
    return _around_base("sce", base, experts, settings)


def model_stock(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="model_stock")."""
    return _around_base("model_stock", base, experts, settings)


def slerp(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="slerp")."""
    return _around_base("slerp", base, experts, settings)


def gradient(
    base: State, experts: Mapping[str, State], *, outside: float, values: Sequence[float]
) -> State:
    """mergekit.config.evaluate_setting and merge_state_dicts(method="task_arithmetic").

    A "gradient": a list of values along depth, the same for every expert, as in mergekit's
    configuration files.
    """
    depth = {name: _block(name) for name in SHAPES}
    weights = [
        outside
        if block is None
        else evaluate_setting(
            name, list(values), block / (BLOCKS - 1), validate=lambda value: float(value)
        )
        for name, block in depth.items()
    ]
    per_expert = {name: PerGroupValues(weights) for name in experts}
    return _task_arithmetic_by_tensor(base, experts, per_expert)


def swapped_layers(base: State, experts: Mapping[str, State], *, shares: Sequence[float]) -> State:
    """mergekit.merge_methods.merge_state_dicts(method="linear") with PerGroupValues.

    Block by block the first expert's share, the rest is the second's; outside the blocks the first.
    """
    first = [1.0 if (block := _block(name)) is None else shares[block] for name in SHAPES]
    rows = {"one": first, "two": [1.0 - share for share in first]}
    per_tensor = PerGroupValues(
        [{expert: row[i] for expert, row in rows.items()} for i in range(len(SHAPES))]
    )
    return merge_state_dicts(
        dict(experts), "linear", parameters={"weight": per_tensor, "normalize": True}
    )


def _task_arithmetic_by_tensor(
    base: State, experts: Mapping[str, State], per_expert: Mapping[str, PerGroupValues]
) -> State:
    rows = [
        {expert: values.values[i] for expert, values in per_expert.items()}
        for i in range(len(SHAPES))
    ]
    return merge_state_dicts(
        {"base": base, **experts},
        "task_arithmetic",
        base="base",
        parameters={"weight": PerGroupValues(rows)},
    )


def _around_base(
    method: str, base: State, experts: Mapping[str, State], settings: Mapping[str, Any]
) -> State:
    """One weight per expert; masks are drawn from torch's global generator, seeded here."""
    parameters = dict(settings)
    if "weight" in parameters:
        parameters["weight"] = dict(zip(experts, parameters["weight"], strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return merge_state_dicts(
            {"base": base, **experts}, method, base="base", parameters=parameters
        )


def _block(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("encoder.layers.") else None


ONES = (1.0, 1.0, 1.0)
UNEQUAL = (1.0, 0.4, 1.7)

CASES = (
    Case("mergekit-linear", linear, {"weight": UNEQUAL, "normalize": True}),
    Case("mergekit-linear-plain", linear, {"weight": (0.5, 0.3, 0.4), "normalize": False}),
    Case("mergekit-task-arithmetic", task_arithmetic, {"weight": (0.4, 0.3, 0.6)}),
    Case(
        "mergekit-task-arithmetic-scaled",
        task_arithmetic,
        {"weight": UNEQUAL, "lambda": 0.7, "normalize": True},
    ),
    Case("mergekit-ties", ties, {"weight": ONES, "density": 0.3}, kind="rivals"),
    Case("mergekit-ties-weighted", ties, {"weight": UNEQUAL, "density": 0.3}, kind="rivals"),
    Case(
        "mergekit-ties-sum",
        ties,
        {"weight": UNEQUAL, "density": 0.3, "normalize": False},
        kind="rivals",
    ),
    Case("mergekit-ties-fraction", ties, {"weight": ONES, "density": 0.27}, kind="rivals"),
    Case(
        "mergekit-ties-mirrored",
        ties,
        {"weight": (1.0, 1.0), "density": 1.0},
        experts=2,
        kind="mirrored",
    ),
    Case("mergekit-dare-linear-all", dare_linear, {"weight": (0.4, 0.3, 0.6), "density": 1.0}),
    Case("mergekit-dare-linear-half", dare_linear, {"weight": (1.0,), "density": 0.5}, experts=1),
    Case(
        "mergekit-dare-ties-all",
        dare_ties,
        {"weight": UNEQUAL, "density": 1.0, "normalize": True},
        kind="rivals",
    ),
    Case("mergekit-dare-ties-half", dare_ties, {"weight": (1.0,), "density": 0.5}, experts=1),
    Case("mergekit-della-all", della, {"weight": UNEQUAL, "density": 1.0}, kind="rivals"),
    Case("mergekit-della-linear-all", della_linear, {"weight": (0.4, 0.3, 0.6), "density": 1.0}),
    Case(
        "mergekit-della-linear-half",
        della_linear,
        {"weight": (1.0,), "density": 0.5, "epsilon": 0.4},
        experts=1,
    ),
    Case(
        "mergekit-breadcrumbs",
        breadcrumbs,
        {"weight": (0.4, 0.3, 0.6), "density": 0.5, "gamma": 0.1},
    ),
    Case(
        "mergekit-breadcrumbs-small", breadcrumbs, {"weight": ONES, "density": 0.5, "gamma": 0.01}
    ),
    Case(
        "mergekit-breadcrumbs-crowded", breadcrumbs, {"weight": ONES, "density": 0.9, "gamma": 0.2}
    ),
    Case(
        "mergekit-breadcrumbs-ties",
        breadcrumbs_ties,
        {"weight": ONES, "density": 0.5, "gamma": 0.1, "normalize": True},
        kind="rivals",
    ),
    Case("mergekit-sce", sce, {"select_topk": 1.0}),
    Case("mergekit-sce-selected", sce, {"select_topk": 0.3}),
    Case("mergekit-sce-alone", sce, {"select_topk": 0.5}, experts=1),
    Case("mergekit-model-stock", model_stock, {"filter_wise": False}),
    Case("mergekit-model-stock-rivals", model_stock, {"filter_wise": False}, kind="rivals"),
    Case("mergekit-slerp", slerp, {"t": 0.3}, experts=1),
    Case("mergekit-gradient", gradient, {"outside": 0.2, "values": (0.2, 0.6)}),
    Case("mergekit-swapped-layers", swapped_layers, {"shares": (1.0, 0.0, 1.0)}, experts=2),
    Case(
        "mergekit-swapped-layers-transition", swapped_layers, {"shares": (1.0, 0.5, 0.5)}, experts=2
    ),
)
