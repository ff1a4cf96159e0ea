"""table."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem, Strategy


@dataclass(frozen=True)
class StrategyInfo:
    """A strategy by name, and what a user needs to choose it.

    Attributes:
        name: As in the study file.
        module, type_name: Where the class lives.
        summary: What it does, in one line.
        source: Paper or library.
        when: When to use it, in one line.
        objectives: ``one`` (several are combined by the study's weights), ``several`` (searches for
            a front), ``any``.
        dims: Dimensions between which it is sensible; None: no upper end.
        budget: Trials that it needs to be worth its while, in words.
        space: What its points are: ``coefficients`` (any box), or a space of its own that the study
            then searches.
        most: Dimensions above which it refuses; None: none.
        slow: Where an ask or a tell takes more than 50 ms of CPU, in words; empty: nowhere.
        preset: Keys of the study's ``space`` section that it sets unless the study does.
    """

    name: str
    module: str
    type_name: str
    summary: str
    source: str
    when: str
    objectives: Literal["one", "several", "any"] = "one"
    dims: tuple[int, int | None] = (1, None)
    budget: str = ""
    space: Literal["coefficients", "segments", "mixed", "product"] = "coefficients"
    most: int | None = None
    slow: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Strategy]:
        """Import the class."""
        loaded: type[Strategy] = getattr(importlib.import_module(self.module), self.type_name)
        return loaded

    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters: the options of the study file."""
        parameters = inspect.signature(self.load()).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _entry(name: str, type_name: str, **facts: Any) -> StrategyInfo:
    """An entry whose file is called as it is."""
    return StrategyInfo(name, f"mergesearch.search.strategies.{name}", type_name, **facts)


_ALL = (
    _entry(
        "cma_es",
        "CmaEs",
        summary="adapts a Gaussian to where good merges lie; larger populations after restarts and "
        "under noise",
        source="Hansen 2016, The CMA Evolution Strategy: A Tutorial (pycma)",
        when="the default for one objective",
        dims=(2, 2000),
        budget="100 or more",
    ),
    _entry(
        "quadratic",
        "Quadratic",
        summary="a quadratic model in a trust region proposes beside CMA-ES, while it predicts",
        source="Powell 2006, The NEWUOA software for unconstrained optimization without "
        "derivatives",
        when="one objective, up to some 16 dimensions or noisy losses; otherwise about as good as "
        "cma_es",
        dims=(1, 64),
        budget="50 or more",
        most=256,
    ),
    _entry(
        "m2n2",
        "M2n2",
        summary="an archive of merges that compete for items; children join two at a split point",
        source="Abrantes 2025, Competition and Attraction Improve Model Fusion (2508.16204)",
        when="experts with complementary skills, per-item scores, thousands of cheap trials",
        dims=(2, None),
        budget="500 or more",
        space="segments",
    ),
    _entry(
        "medsamix",
        "MedSaMix",
        summary="a random forest proposes a method for every layer group; Hyperband on items, a "
        "front by ParEGO",
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
        summary="two chained CMA-ES stages: how much of each adapter to keep, then signed scales",
        source="Chen 2025, Black-box Model Merging for Language-Model-as-a-Service (2509.12951)",
        when="pools of LoRA adapters, many of which may be useless or harmful",
        dims=(2, 200),
        budget="500 or more",
        space="product",
    ),
    _entry(
        "nevergrad",
        "Nevergrad",
        summary="an optimizer of nevergrad by name, NGOpt by default",
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
        summary="a sampler of Optuna by name, TPE by default; tpe, gp, nsga2 and nsga3 search for "
        "a front too",
        source="Akiba 2019, Optuna: a next-generation hyperparameter optimization framework "
        "(optuna)",
        when="sampler: gp with few, smooth coefficients and costly trials; else to compare",
        objectives="any",
        dims=(1, 32),
        budget="50 or more; gp up to 500",
        slow="gp: 0.1 s after 200 trials, 1 s after 500, more for several objectives; tpe: 0.1 s "
        "at 128 dimensions",
    ),
    _entry(
        "lorahub",
        "LoraHub",
        summary="the preset of LoraHub: NGOpt in [-1.5, 1.5] from 0, with a penalty on large "
        "coefficients",
        source="Huang 2023, LoraHub: efficient cross-task generalization via dynamic LoRA "
        "composition (2307.13269)",
        when="few-shot composition of adapters, one coefficient each",
        dims=(1, 299),
        budget="40 or more",
        preset={"granularity": "task", "bounds": (-1.5, 1.5), "start": 0.0},
    ),
    _entry(
        "pcb_es",
        "PcbEs",
        summary="the preset of PCB-merging with evolution: NGOpt in [0.8, 1.3] from 1",
        source="Du 2024, Parameter competition balancing for model merging (2410.02396)",
        when="with the operator pcb, one coefficient each",
        dims=(1, 299),
        budget="100 or more",
        preset={"granularity": "task", "bounds": (0.8, 1.3), "start": 1.0},
    ),
    _entry(
        "pso",
        "ParticleSwarm",
        summary="particles start at base, experts and merges of them, and are drawn to the best "
        "places",
        source="Zhang 2025, PSO-Merging: merging models based on particle swarm optimization "
        "(2508.19839)",
        when="as a baseline without a model of the losses",
        budget="100 or more",
    ),
    _entry(
        "model_swarms",
        "ModelSwarms",
        summary="particles drawn to the best places, pushed from the worst, brought back when they "
        "stray",
        source="Feng 2024, Model Swarms: collaborative search to adapt LLM experts (2410.11163)",
        when="to compare with the paper; it comes near an optimum and no nearer",
        budget="100 or more",
    ),
    _entry(
        "evogm",
        "EvoGm",
        summary="rounds of evolution, whose best merges are directions of the next; no learned "
        "proposals",
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
        when="the default for several objectives in few dimensions; trials that are expensive",
        objectives="several",
        dims=(1, 128),
        budget="10 d or more, best (d + 1)(d + 2)",
        most=256,
        slow="up to 1 s where models and front are made anew, which is rare: 4 ms a trial on "
        "average",
    ),
    _entry(
        "bayesian_map",
        "BayesianMap",
        summary="MAP whose design follows rays from the base to where each objective's model errs "
        "most",
        source="Li 2024, MAP: model merging with amortized Pareto fronts (2406.07529)",
        when="up to six coefficients, objectives that are rough in places",
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
        when="many experts, one coefficient each, and one compromise wanted rather than a front",
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
        when="two or three objectives, many dimensions",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "nsga3",
        "Nsga3",
        summary="evolves a population towards reference directions, one result at a time",
        source="Deb 2014, An evolutionary many-objective optimization algorithm: NSGA-III (pymoo)",
        when="four objectives or more",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "sms_emoa",
        "SmsEmoa",
        summary="evolves a population by the volume that each member adds",
        source="Beume 2007, SMS-EMOA: multiobjective selection based on dominated hypervolume "
        "(pymoo)",
        when="two to four objectives (six at most), many dimensions",
        objectives="several",
        budget="200 or more",
    ),
    _entry(
        "cma_parego",
        "CmaParEgo",
        summary="several CMA-ES side by side, each with its own weighting of the objectives",
        source="Knowles 2006, ParEGO: a hybrid algorithm with on-line landscape approximation "
        "(pycma)",
        when="several objectives, many dimensions",
        objectives="several",
        dims=(2, 2000),
        budget="100 for every weighting (five for two objectives)",
    ),
    _entry(
        "adamerging",
        "AdaMerging",
        summary="Adam on the coefficients, by gradients of the entropy on unlabelled items or of "
        "another loss",
        source="Yang 2024, AdaMerging: Adaptive Model Merging for Multi-Task Learning (2310.02575)",
        when="many coefficients, a loss with gradients; with operator: ties it is AdaMerging++",
        budget="20 or more, of 25 steps each",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0), "start": 0.3},
    ),
    _entry(
        "expert_merging",
        "ExpertMerging",
        summary="AdamW on logits of the coefficients, by the alignment of the merge to the experts",
        source="Zhang 2025, Expert Merging: Model Merging with Unsupervised Expert Alignment "
        "(2509.25712)",
        when="unlabelled items of each expert's domain, and an alignment evaluator",
        budget="5 or more, of 10 steps each",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0), "start": 0.1},
    ),
    _entry(
        "expert_merging_pp",
        "ExpertMergingPp",
        summary="Expert Merging, refined in chunks of the tensors that change most",
        source="Zhang 2025, Expert Merging: ... and Importance-Guided Layer Chunking (2509.25712)",
        when="as expert_merging, where a few large tensors carry most of the change",
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
        when="large pools of experts, some of them irrelevant, and a loss with gradients",
        budget="10 or more",
        preset={"granularity": "tensor", "bounds": (0.0, 1.0)},
    ),
    _entry(
        "gradient_warm_cma",
        "GradientWarmCma",
        summary="a few gradient steps of a smooth loss, then CMA-ES from there on what is measured",
        source="Hansen 2016 (pycma) after Kingma 2015, Adam: a method for stochastic optimization",
        when="an objective without gradients, such as accuracy, beside a loss that has some",
        dims=(2, 2000),
        budget="100 or more",
    ),
    _entry(
        "portfolio",
        "Portfolio",
        summary="several strategies take turns and share one log",
        source="Gomes 2001, Algorithm portfolios",
        when="when it is not known which strategy suits",
        objectives="any",
        budget="100 for every member",
    ),
    _entry(
        "sobol",
        "Sobol",
        summary="scrambled Sobol points, denser near the start",
        source="Owen 1998, Scrambling Sobol' and Niederreiter-Xing points (scipy)",
        when="the baseline to beat",
        budget="any",
    ),
)


#: The name under which a rule chooses (:mod:`mergesearch.search.strategies.auto`).
AUTO = "auto"


STRATEGIES: Mapping[str, StrategyInfo] = {entry.name: entry for entry in _ALL}


def get_strategy_info(name: str) -> StrategyInfo:
    """The strategy called ``name``.

    Raises:
        InputError: If there is none; names the closest and lists the known ones.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    known = sorted([*STRATEGIES, AUTO])
    close = [key for key in known if key.startswith(name)] or difflib.get_close_matches(
        name, known, n=1
    )
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"strategy.name: expected one of {known}, received {name!r}{hint}")


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
        f"{name} options", __config__=ConfigDict(extra="forbid", strict=False), **fields
    )
    try:
        validated: dict[str, Any] = model.model_validate(dict(options)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"strategy.{key}: unknown option of {name}; known: {sorted(known)}"
            ) from None
        raise InputError(f"strategy.{key}: {first['msg']}, received {first['input']!r}") from None
    return validated


def build_strategy(name: str, options: Mapping[str, Any], problem: Problem, seed: int) -> Strategy:
    """A fresh strategy; its only randomness comes from ``seed``."""
    factory: Any = get_strategy_info(name).load()
    strategy: Strategy = factory(problem, seed, **options)
    return strategy
