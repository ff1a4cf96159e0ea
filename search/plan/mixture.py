"""Studies of one mixture of experts: what is checked, the space, and the known merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.merging import Field, InputError, Recipe, Source
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.family.family import ModelFamily, align_family
from mergesearch.merging.mixture.counting import counted_statistics
from mergesearch.merging.mixture.grouping import counts_by_usage
from mergesearch.merging.mixture.in_recipe import mixture_of, with_mixture
from mergesearch.merging.mixture.layers import moe_layers
from mergesearch.merging.mixture.operators import MIXTURE_OPERATORS, WeightedOptions
from mergesearch.merging.mixture.planning import opened
from mergesearch.merging.mixture.recipe import get_mixture_operator, parse_options
from mergesearch.merging.tensors.memo import Memo
from mergesearch.search.plan.anchors import Anchor
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.strategies.table import AUTO, get_strategy_info
from mergesearch.spaces.mixture_space import MixtureSpace, mixture_space
from mergesearch.spaces.spec import SpaceSpec

#: Hyperparameters of operators on mixtures that follow from a point of the space.
SEARCHED = ("experts", "weights", "allocation")
#: Keys of the ``space`` section that mean something to such a study.
_KEYS = ("mixture", "bounds")


def is_mixture_study(spec: StudySpec) -> bool:
    """Whether a study makes one mixture smaller: its operator is one on mixtures."""
    return spec.operator.name in MIXTURE_OPERATORS


def check_mixture_study(spec: StudySpec) -> None:
    """Refuse sections that do not fit a study of one mixture; opens no checkpoint.

    Raises:
        InputError: In one line.
    """
    name = spec.operator.name
    if spec.experts:
        raise InputError(
            f"experts: expected none with operator {name}, which makes the base itself smaller, "
            f"received {len(spec.experts)}; leave them out"
        )
    if spec.base is None or spec.space.mixture is None:
        missing = "base" if spec.base is None else "space.mixture"
        raise InputError(f"{missing}: required key is missing: operator {name} needs it")
    given = next((key for key in SEARCHED if key in spec.operator.options), None)
    if given is not None:
        raise InputError(
            f"operator.{given}: expected none in a study, whose points say it, received one; set "
            "space.mixture"
        )
    operator = get_mixture_operator(name)
    parse_options(operator, {**spec.operator.options, "experts": 1})
    if operator.drops:
        raise InputError(
            f"operator: expected one that stores merged experts where a block keeps fewer than "
            f"others, received {name}, which drops them; choose reroute_experts, mc_smoe or sub_moe"
        )
    if spec.space.mixture.weights and not issubclass(operator.options, WeightedOptions):
        raise InputError(
            f"space.mixture.weights: expected false with operator {name}, which weights all alike, "
            "received true; choose mc_smoe or sub_moe"
        )
    _check_rest(spec)


def _check_rest(spec: StudySpec) -> None:
    """Refuse keys of other sections that mean nothing here."""
    unset = SpaceSpec()
    odd = next(
        (
            key
            for key in SpaceSpec.model_fields
            if key not in _KEYS and getattr(spec.space, key) != getattr(unset, key)
        ),
        None,
    )
    if odd is not None:
        raise InputError(
            f"space.{odd}: means nothing to a study of one mixture; keys of its space: "
            f"{', '.join(_KEYS)}"
        )
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches any box, for the experts of one mixture, "
            f"received {entry.name}; choose cma_es, for example"
        )
    if spec.workers.gpus > 1:
        raise InputError(
            f"workers.gpus: expected at most 1 for the experts of one mixture, received "
            f"{spec.workers.gpus:g}"
        )


def mixture_template(
    spec: StudySpec, base: Checkpoint, fingerprints: Sequence[str]
) -> tuple[Recipe, ModelFamily]:
    """The study's recipe with all experts kept, and its checkpoint.

    Raises:
        CheckpointError: If the base is no mixture that is known.
        RecipeError: If operator or hyperparameters do not fit it.
    """
    assert spec.base is not None
    family = align_family(base, [], spec.special)
    layers = moe_layers(base)
    recipe = Recipe(
        base=Source("base", spec.base, fingerprints[0] if fingerprints else ""),
        experts=(),
        operator="task_arithmetic",  # of no experts: the base as it is
        field=Field.constant(family.layout.size, np.zeros(0)),
        layout=family.layout.digest,
        special=spec.special.choices,
    )
    options = parse_options(
        get_mixture_operator(spec.operator.name),
        {**spec.operator.options, "experts": [layer.experts for layer in layers]},
    )
    template = with_mixture(recipe, spec.operator.name, options.model_dump())
    opened(mixture_of(template))
    return template, family


def space_of_mixture(spec: StudySpec, template: Recipe, arenas: Path | None) -> MixtureSpace:
    """The space of a study of one mixture.

    Args:
        spec: The resolved study file.
        template: The study's recipe.
        arenas: Where prepared results are, for a start that runs the model.

    Raises:
        InputError: If a value of the section does not fit the mixture.
    """
    section = spec.space.mixture
    assert section is not None
    recipe = mixture_of(template)
    checkpoint, layers = opened(recipe)
    usage = None
    if section.prior == "usage":
        memo = None if arenas is None else Memo(arenas / "shared")
        statistics = counted_statistics(recipe, checkpoint, layers, memo)
        total = section.total or int((section.mean or 1) * len(layers))
        usage = counts_by_usage(statistics, total)
    blocks = [f"block {number}" for number in _numbers([layer.block for layer in layers])]
    return mixture_space(
        section, template, blocks, layers[0].experts, usage=usage, bounds=spec.space.bounds
    )


def _numbers(names: Sequence[str]) -> list[str]:
    """Numbers of blocks, or their whole names where they have none of their own."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len({*last}) == len(names) else [*names]


def mixture_anchors(spec: StudySpec, space: MixtureSpace) -> tuple[Anchor, ...]:
    """The same number in every block, by usage, pruned, and the start: all within the budget.

    Those with one number for all are there where the budget allows a whole one. The base would win
    every such study, so it is none of them.
    """
    assert spec.space.mixture is not None
    blocks = len(space.blocks)
    named = []
    kept = int(space.mean)
    if space.mean == kept:
        own = dict(space.template.mixture)
        named.append((f"{kept} in each block", space.recipe([kept] * blocks)))
        if spec.space.mixture.prior != "usage":  # else the start is that
            by_usage = {**own, "experts": kept, "allocation": "usage"}
            named.append((f"{kept} by usage", replace(space.template, mixture=_pairs(by_usage))))
        pruned = {"calibration": own["calibration"], "experts": [kept] * blocks}
        named.append((f"pruned to {kept}", with_mixture(space.template, "prune_experts", pruned)))
    named.append(("start", space.decode(space.start)))
    found: dict[str, Anchor] = {}
    for name, recipe in named:
        found.setdefault(recipe.digest, Anchor(name, recipe))
    return tuple(found.values())


def _pairs(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))
