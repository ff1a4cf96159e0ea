"""Methods with models of the losses: Optuna, SMAC3, Py-BOBYQA, and nevergrad's choice."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from experiments.league.libraries.base import Array, Library, Task
from experiments.league.libraries.inverted import Inverted


class Nevergrad:
    """An optimizer of nevergrad by name, from the start.

    It is asked one question at a time: solvers that NGOpt chooses wait for an answer to the last
    one before they ask the next, and for ever where it is asked first.

    Args:
        task: The problem.
        kind: As in nevergrad's registry.
    """

    def __init__(self, task: Task, kind: str = "NGOpt") -> None:
        import nevergrad as ng

        box = ng.p.Array(init=task.start).set_mutation(sigma=task.sigma).set_bounds(0.0, 1.0)
        box.random_state = np.random.RandomState(task.seed)
        self._optimizer = ng.optimizers.registry[kind](box, budget=task.budget, num_workers=1)
        self._asked: list[Any] = []
        self._answered = 0

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point; None while a question is open."""
        if self._answered < len(self._asked):
            return None
        self._asked.append(self._optimizer.ask())
        return len(self._asked) - 1, np.asarray(self._asked[-1].value)

    def tell(self, number: int, losses: Array) -> None:
        """The losses at a question's point."""
        self._optimizer.tell(self._asked[number], float(losses.mean()))
        self._answered += 1

    def best(self) -> Array | None:
        """Nevergrad's recommendation."""
        return np.asarray(self._optimizer.provide_recommendation().value)


class Optuna:
    """A sampler of Optuna by name; anchors are completed trials.

    Args:
        task: The problem.
        kind: Class of ``optuna.samplers``.
        options: Its arguments.
    """

    def __init__(self, task: Task, kind: str, **options: Any) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._names = [f"x{index:04d}" for index in range(task.dim)]
        unit = optuna.distributions.FloatDistribution(0.0, 1.0)
        self._box: dict[str, optuna.distributions.BaseDistribution] = dict.fromkeys(
            self._names, unit
        )
        sampler = getattr(optuna.samplers, kind)(seed=task.seed, **options)
        self._study = optuna.create_study(
            sampler=sampler, directions=["minimize"] * task.objectives
        )
        for point, losses in zip(task.points, task.losses, strict=True):
            named = dict(zip(self._names, point.tolist(), strict=True))
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=named, distributions=self._box, values=losses.tolist()
                )
            )

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point."""
        trial = self._study.ask(self._box)
        return trial.number, np.array([trial.params[name] for name in self._names])

    def tell(self, number: int, losses: Array) -> None:
        """The losses at a question's point."""
        self._study.tell(number, losses.tolist())

    def best(self) -> Array | None:
        """Nothing beyond the best trial."""
        return None


def optuna_cma(task: Task) -> Library:
    """CMA-ES of Optuna, from the start."""
    names = [f"x{index:04d}" for index in range(task.dim)]
    x0 = dict(zip(names, task.start.tolist(), strict=True))
    return Optuna(task, "CmaEsSampler", x0=x0, sigma0=task.sigma)


class Smac:
    """SMAC3's facade for hyperparameters: a random forest; anchors are told first.

    Args:
        task: The problem.
    """

    def __init__(self, task: Task) -> None:
        from ConfigSpace import Configuration, ConfigurationSpace, Float
        from smac import HyperparameterOptimizationFacade, Scenario
        from smac.runhistory import TrialInfo, TrialValue

        self._value = TrialValue
        space = ConfigurationSpace(seed=task.seed)
        names = [f"x{index:04d}" for index in range(task.dim)]
        space.add([Float(name, (0.0, 1.0)) for name in names])
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=10**6,
            seed=task.seed,
            output_directory=tempfile.mkdtemp(prefix="league-smac-"),
        )
        facade = HyperparameterOptimizationFacade
        self._smac = facade(
            scenario,
            lambda config, seed=0: 0.0,
            initial_design=facade.get_initial_design(
                scenario, n_configs=max(2, min(task.dim, task.budget // 10))
            ),
            logging_level=False,
            overwrite=True,
        )
        for point, losses in zip(task.points, task.losses, strict=True):
            values = dict(zip(names, point.tolist(), strict=True))
            info = TrialInfo(Configuration(space, values=values), seed=0)
            self._smac.tell(info, TrialValue(cost=float(losses.mean())), save=False)
        self._asked: list[Any] = []
        self._names = names

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point."""
        info = self._smac.ask()
        self._asked.append(info)
        return len(self._asked) - 1, np.array([info.config[name] for name in self._names])

    def tell(self, number: int, losses: Array) -> None:
        """The losses at a question's point."""
        value = self._value(cost=float(losses.mean()))
        self._smac.tell(self._asked[number], value, save=False)

    def best(self) -> Array | None:
        """Nothing beyond the best trial."""
        return None


def bobyqa(task: Task) -> Library:
    """Py-BOBYQA with its settings for noise, from the start."""
    import pybobyqa

    points = 2 * task.dim + 1
    if points > task.budget // 2:
        points = task.dim + 2

    def run(call: Any) -> Array:
        np.random.seed(task.seed)  # noqa: NPY002  (Py-BOBYQA draws from the global generator)
        found = pybobyqa.solve(
            call,
            np.clip(task.start, 0.01, 0.99),
            bounds=(np.zeros(task.dim), np.ones(task.dim)),
            npt=points,
            rhobeg=min(task.sigma, 0.4),
            rhoend=1e-4,
            maxfun=10**6,
            objfun_has_noise=True,
            do_logging=False,
        )
        return np.asarray(np.clip(found.x, 0.0, 1.0))

    return Inverted(run)
