"""The libraries by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from experiments.league.libraries import gaussian, models, populations
from experiments.league.libraries.base import Library, Task

LIBRARIES: Mapping[str, Callable[[Task], Library]] = {
    "pycma": populations.pycma,
    "cmaes": populations.cmaes,
    "cmaes separable": partial(populations.cmaes, kind="SepCMA"),
    "cmaes lr-adapt": partial(populations.cmaes, lr_adapt=True),
    "nevergrad NGOpt": models.Nevergrad,
    "Optuna TPE": partial(models.Optuna, kind="TPESampler", multivariate=True),
    "Optuna GP": partial(models.Optuna, kind="GPSampler"),
    "Optuna CMA": models.optuna_cma,
    "SMAC3": models.Smac,
    "BoTorch TuRBO": gaussian.Turbo,
    "BoTorch qNEHVI": gaussian.Qnehvi,
    "Py-BOBYQA": models.bobyqa,
    "scipy DE": populations.scipy_de,
    "pymoo NSGA-II": partial(populations.pymoo, module="pymoo.algorithms.moo.nsga2", kind="NSGA2"),
    "pymoo NSGA-III": partial(
        populations.pymoo, module="pymoo.algorithms.moo.nsga3", kind="NSGA3", directions=True
    ),
    "pymoo AGE-MOEA2": partial(
        populations.pymoo, module="pymoo.algorithms.moo.age2", kind="AGEMOEA2"
    ),
    "pymoo SMS-EMOA": partial(populations.pymoo, module="pymoo.algorithms.moo.sms", kind="SMSEMOA"),
}
