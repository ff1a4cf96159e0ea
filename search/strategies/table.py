"""The table of search strategies: what each is called, and what a user needs to choose one.

A strategy is a class ``Strategy(problem, seed, *, options...)`` in a file of its own; its
keyword-only arguments, with their annotations and defaults, are its options in the study file.
There is no second table of option names. Packages add others by entry points of the group
``mergesearch.strategies``.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.errors import did_you_mean
from mergesearch.merging.extensions.references import is_reference
from mergesearch.merging.extensions.table import Table
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.search.strategies.base import Problem, Strategy
from mergesearch.search.strategies.info import StrategyInfo, as_strategy_info

__all__ = [
    "AUTO",
    "STRATEGIES",
    "StrategyInfo",
    "build_strategy",
    "check_options",
    "get_strategy_info",
]


def _entry(name: str, type_name: str, **facts: Any) -> StrategyInfo:
    """An entry whose module has the same name."""
    return StrategyInfo(name, f"mergesearch.search.strategies.{name}", type_name, **facts)


_ALL = (
    _entry(
        "cma_es",
        "CmaEs",
        summary="adapts a Gaussian to where good merges lie, with larger populations after "
        "restarts and under noise",
        source="Hansen 2016, The CMA Evolution Strategy: A Tutorial (pycma)",
        when="for one objective; the default where trials are fewer than coordinates and nothing "
        "gives gradients",
        dims=(2, 2000),
        budget="100 or more",
    ),
    _entry(
        "quadratic",
        "Quadratic",
        summary="lets a quadratic model in a trust region propose beside CMA-ES while it predicts",
        source="Powell 2006, The NEWUOA software for unconstrained optimization without "
        "derivatives",
        when="for one objective with a trial or more for each coordinate, where it is the default; "
        "it leads cma_es most on merges",
        dims=(1, 512),
        budget="50 or more",
        most=512,
    ),
    _entry(
        "block_coordinate",
        "BlockCoordinate",
        summary="searches all coefficients, then refines those of a quarter of the blocks after "
        "another, from the top, while workers keep what the blocks below gave",
        source="Tseng 2001, Convergence of a block coordinate descent method for "
        "nondifferentiable minimization",
        when="for one objective and a coefficient for each block, where evaluating is nearly all "
        "of a trial's time and items are read whole (no generation)",
        dims=(2, 2000),
        budget="100 or more",
        holds_blocks=True,
    ),
    _entry(
        "m2n2",
        "M2n2",
        summary="keeps an archive of merges that compete for items; children join two at a split "
        "point",
        source="Abrantes 2025, Competition and Attraction Improve Model Fusion (2508.16204)",
        when="for experts with complementary skills, with per-item scores and thousands of cheap "
        "trials",
        dims=(2, None),
        budget="500 or more",
        space="segments",
    ),
    _entry(
        "medsamix",
        "MedSaMix",
        summary="lets a random forest propose a method for every layer group, with Hyperband on "
        "items and ParEGO for several objectives",
        source="Yang 2025, MedSAMix: A Training-Free Model Merging Approach (2508.11032)",
        when="when it is not known which operator suits which layers",
        objectives="any",
        dims=(1, 2000),
        budget="120, or 200 for several objectives, or more",
        space="mixed",
        slow="0.1 to 0.5 s where the forest is fitted again, with every tenth more results",
    ),
    _entry(
        "evo_merging",
        "EvoMerging",
        summary="chains two CMA-ES stages: how much of each adapter to keep, then signed scales",
        source="Chen 2025, Black-box Model Merging for Language-Model-as-a-Service (2509.12951)",
        when="for pools of LoRA adapters, many of which may be useless or harmful",
        dims=(2, 200),
        budget="500 or more",
        space="product",
    ),
    _entry(
        "nevergrad",
        "Nevergrad",
        summary="runs an optimizer of nevergrad by name, NGOpt by default",
        source="Rapin 2018, Nevergrad: a gradient-free optimization platform (nevergrad)",
        when="to compare with a method that nevergrad has; NGOpt and CMA suit short budgets",
        dims=(1, 299),
        budget="40 or more",
        slow="EDA and the splits into single coordinates (NoisyInfSplits): 50 ms at 300 "
        "dimensions, 0.3 s at 1,500",
    ),
    _entry(
        "optuna",
        "OptunaSampler",
        summary="runs a sampler of Optuna by name, TPE by default; tpe, gp, nsga2 and nsga3 can "
        "search for a front",
        source="Akiba 2019, Optuna: a next-generation hyperparameter optimization framework "
        "(optuna)",
        when="with `sampler: gp` for few, smooth coefficients and costly trials; otherwise to "
        "compare",
        objectives="any",
        dims=(1, 32),
        budget="50 or more; gp up to 500",
        slow="gp: 0.1 s after 200 trials, 1 s after 500, more for several objectives; tpe: 0.1 s "
        "at 128 dimensions",
    ),
    _entry(
        "lorahub",
        "LoraHub",
        summary="runs NGOpt as in LoraHub: in [-1.5, 1.5] from 0, with a penalty on large "
        "coefficients",
        source="Huang 2023, LoraHub: efficient cross-task generalization via dynamic LoRA "
        "composition (2307.13269)",
        when="for few-shot composition of adapters with one coefficient each",
        dims=(1, 299),
        budget="40 or more",
        preset={"granularity": "task", "bounds": (-1.5, 1.5), "start": 0.0},
    ),
    _entry(
        "pcb_es",
        "PcbEs",
        summary="runs NGOpt as in PCB-merging with evolution: in [0.8, 1.3] from 1",
        source="Du 2024, Parameter competition balancing for model merging (2410.02396)",
        when="with `operator: pcb` and one coefficient for each expert",
        dims=(1, 299),
        budget="100 or more",
        preset={"granularity": "task", "bounds": (0.8, 1.3), "start": 1.0},
    ),
    _entry(
        "pso",
        "ParticleSwarm",
        summary="moves particles from base, experts and merges of them towards the best known "
        "points",
        source="Zhang 2025, PSO-Merging: merging models based on particle swarm optimization "
        "(2508.19839)",
        when="as a baseline without a model of the losses",
        budget="100 or more",
    ),
    _entry(
        "model_swarms",
        "ModelSwarms",
        summary="moves particles towards the best points and away from the worst, and brings back "
        "those that stray",
        source="Feng 2024, Model Swarms: collaborative search to adapt LLM experts (2410.11163)",
        when="to compare with the paper; it comes near an optimum but does not converge to it",
        budget="100 or more",
    ),
    _entry(
        "evogm",
        "EvoGm",
        summary="evolves merges in rounds whose best merges are directions of the next, without "
        "learned proposals",
        source="EvoGM 2026, evolutionary generative merging (2605.29295), in its style",
        when="to compare with evolution along whole merges rather than single coefficients",
        budget="100 or more",
    ),
    _entry(
        "map",
        "Map",
        summary="models every objective by a quadratic, and measures the predicted front where it "
        "adds most volume",
        source="Li 2024, MAP: model merging with amortized Pareto fronts (2406.07529)",
        when="for several objectives with a trial or more for each coordinate, where it is the "
        "default",
        objectives="several",
        dims=(1, 256),
        budget="10 d or more, best (d + 1)(d + 2)",
        most=256,
        slow="up to 1 s where models and front are made anew, which is rare: 4 ms a trial on "
        "average",
    ),
    _entry(
        "bayesian_map",
        "BayesianMap",
        summary="runs MAP with a design along rays from the base to where each objective's model "
        "errs most",
        source="Li 2024, MAP: model merging with amortized Pareto fronts (2406.07529)",
        when="for up to six coefficients and objectives that are rough in some regions",
        objectives="several",
        dims=(2, 6),
        budget="50 or more",
        most=8,
        slow="up to 1 s where models and front are made anew, which is rare: 4 ms a trial on "
        "average",
    ),
    _entry(
        "nested_map",
        "NestedMap",
        summary="merges pairs of models by a MAP of two coefficients until one is left, then "
        "searches around it",
        source="Li 2024, MAP: model merging with amortized Pareto fronts (2406.07529)",
        when="for many experts with one coefficient each, when one compromise is wanted rather "
        "than a front",
        objectives="several",
        dims=(2, 64),
        budget="25 for every expert or more",
        most=256,
        slow="up to 1 s where models and front are made anew, which is rare: 4 ms a trial on "
        "average",
    ),
    _entry(
        "nsga2",
        "Nsga2",
        summary="evolves a population by dominance and crowding, one result at a time",
        source="Deb 2002, A fast and elitist multiobjective genetic algorithm: NSGA-II (pymoo)",
        when="for two or three objectives in many dimensions",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "nsga3",
        "Nsga3",
        summary="evolves a population towards reference directions, one result at a time",
        source="Deb 2014, An evolutionary many-objective optimization algorithm: NSGA-III (pymoo)",
        when="for four objectives or more",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "sms_emoa",
        "SmsEmoa",
        summary="evolves a population by the volume that each member adds",
        source="Beume 2007, SMS-EMOA: multiobjective selection based on dominated hypervolume "
        "(pymoo)",
        when="for two to four objectives, six at most, in many dimensions",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "cma_parego",
        "CmaParEgo",
        summary="runs several CMA-ES side by side, each with its own weighting of the objectives",
        source="Knowles 2006, ParEGO: a hybrid algorithm with on-line landscape approximation "
        "(pycma)",
        when="for several objectives in many dimensions",
        objectives="several",
        dims=(2, 2000),
        budget="100 for every weighting (five for two objectives)",
    ),
    _entry(
        "adamerging",
        "AdaMerging",
        summary="moves the coefficients by Adam along gradients of the entropy on unlabelled "
        "items, or of another loss",
        source="Yang 2024, AdaMerging: Adaptive Model Merging for Multi-Task Learning (2310.02575)",
        when="for many coefficients and a loss with gradients; with `operator: ties` it is "
        "AdaMerging++",
        budget="20 or more, of 25 steps each",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0), "start": 0.3},
    ),
    _entry(
        "expert_merging",
        "ExpertMerging",
        summary="moves logits of the coefficients by AdamW to align the merge with the experts",
        source="Zhang 2025, Expert Merging: Model Merging with Unsupervised Expert Alignment "
        "(2509.25712)",
        when="for unlabelled items of each expert's domain, with an alignment evaluator",
        budget="5 or more, of 10 steps each",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0), "start": 0.1},
    ),
    _entry(
        "expert_merging_pp",
        "ExpertMergingPp",
        summary="runs Expert Merging, then refines it in chunks of the tensors that change most",
        source="Zhang 2025, Expert Merging: Model Merging with Unsupervised Expert Alignment and "
        "Importance-Guided Layer Chunking (2509.25712)",
        when="like expert_merging, when a few large tensors carry most of the change",
        budget="10 or more, of 10 steps each",
        preset={"granularity": "chunk", "bounds": (0.0, 1.0), "start": 0.1},
    ),
    _entry(
        "frank_wolfe",
        "FrankWolfe",
        summary="steps towards the checkpoint that the gradient points to, inside their convex "
        "hull",
        source="Chen 2025, FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization "
        "(2503.12649)",
        when="for large pools of experts, some of them irrelevant, and a loss with gradients",
        budget="10 or more",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0)},
    ),
    _entry(
        "gradient_warm_cma",
        "GradientWarmCma",
        summary="takes a few gradient steps of a smooth loss, then runs CMA-ES from there on what "
        "is measured",
        source="Hansen 2016 (pycma) after Kingma 2015, Adam: a method for stochastic optimization",
        when="for an objective without gradients, such as accuracy, beside a loss that has "
        "gradients",
        dims=(2, 2000),
        budget="100 or more",
    ),
    _entry(
        "hybrid",
        "Hybrid",
        summary="walks along gradients of smooth losses, then lets a surrogate search around their "
        "end, from coarse to fine",
        source="Yang 2024, AdaMerging: Adaptive Model Merging for Multi-Task Learning "
        "(2310.02575), and Powell 2006, The NEWUOA software for unconstrained optimization without "
        "derivatives",
        when="for one objective wherever the evaluators offer a loss with gradients, such as "
        "cross-entropy beside accuracy; there it is the default",
        dims=(1, 2000),
        budget="40 or more",
    ),
    _entry(
        "portfolio",
        "Portfolio",
        summary="lets several strategies take turns and share one log",
        source="Gomes 2001, Algorithm portfolios",
        when="when it is not known which strategy suits the problem",
        objectives="any",
        budget="100 for every member",
    ),
    _entry(
        "sobol",
        "Sobol",
        summary="tries scrambled Sobol points, denser near the start",
        source="Owen 1998, Scrambling Sobol' and Niederreiter-Xing points (scipy)",
        when="as the baseline that a search must beat",
        budget="any",
    ),
)


#: Sizes of populations and the like above this are slips, and would exhaust the memory.
LARGEST_OPTION = 10_000_000
#: The name that lets a rule choose (:mod:`mergesearch.search.strategies.auto`).
AUTO = "auto"


STRATEGIES: Table[StrategyInfo] = Table(
    "strategies", {entry.name: entry for entry in _ALL}, as_strategy_info
)


def get_strategy_info(name: str) -> StrategyInfo:
    """The strategy called ``name``.

    Raises:
        InputError: If there is none; names the closest and lists the known ones.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if is_reference(name):
        raise InputError(
            f"strategy.name: expected a strategy that this process knows, received {name!r}; a "
            "study with allow_code: true may name one of a module, and a program may give one"
        )
    hint = did_you_mean(name, [*STRATEGIES, AUTO])
    raise InputError(f"strategy.name: expected a strategy, received {shown(name)}; {hint}")


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their values converted to the annotated types; defaults filled in.

    Raises:
        InputError: If an option is unknown or has the wrong type.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    if name == AUTO:
        if options:
            raise InputError(
                f"strategy.{min(options)}: auto takes no options; name the strategy that they are "
                "for"
            )
        return {}
    entry = get_strategy_info(name)
    known = entry.options()
    hints = typing.get_type_hints(entry.load().__init__, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], parameter.default) for key, parameter in known.items()
    }
    model = create_model(
        f"{name} options",
        __config__=ConfigDict(extra="forbid", strict=False, allow_inf_nan=False),
        **fields,
    )
    try:
        validated: dict[str, Any] = model.model_validate(dict(options)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(name_shown(str(part)) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"strategy.{key}: unknown option of {name}; {did_you_mean(key, known)}"
            ) from None
        received = shown(first["input"])
        raise InputError(f"strategy.{key}: {first['msg']}, received {received}") from None
    for key, value in validated.items():
        if isinstance(value, int) and not -LARGEST_OPTION <= value <= LARGEST_OPTION:
            raise InputError(
                f"strategy.{key}: expected at most {LARGEST_OPTION}, received {shown(value)}"
            )
    return validated


def build_strategy(name: str, options: Mapping[str, Any], problem: Problem, seed: int) -> Strategy:
    """A fresh strategy; its only randomness comes from ``seed``."""
    factory: Any = get_strategy_info(name).load()
    strategy: Strategy = factory(problem, seed, **options)
    return strategy
