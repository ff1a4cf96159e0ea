"""One run of pycma inside the unit cube, without pycma's global state.

Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772). pycma keeps to the cube by
its smooth linear-quadratic transformation and is always told the unbounded samples that it drew. It
draws from the generator that it is given; numpy's global generator is never touched.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from threading import get_ident
from typing import Any

import numpy as np

from mergesearch.search.strategies.base import Point

#: A run has converged when no coordinate varies by more than this fraction of its range: merges
#: that differ by less cannot be told apart.
PRECISION = 1e-5
#: What pycma imports if it is installed, and needs for nothing that is asked of it here.
OPTIONAL = frozenset({"matplotlib", "scipy"})


class Engine:
    """A Gaussian over ``dim`` unbounded coordinates, adapted by pycma.

    Args:
        start: Mean at first, in the unit cube ``(dim,)``.
        sigma: Step size at first, as a fraction of the range.
        population: Results per update.
        separable: Diagonal covariance.
        rng: The strategy's generator.
        scale: First steps of the coordinates, relative to ``sigma`` ``(dim,)``; None: all the same.
    """

    def __init__(
        self,
        start: Point,
        sigma: float,
        population: int,
        separable: bool,
        rng: np.random.Generator,
        scale: Point | None = None,
    ) -> None:
        cma = _pycma()
        self.population = population
        self._dim = start.size
        self._separable = separable
        self._rng = rng
        self._transform = cma.transformations.BoxConstraintsLinQuadTransformation([[0.0, 1.0]])
        options = {
            "popsize": population,
            "CMA_diagonal": separable,
            # Mirrored and mean-shift samples exist only in whole populations, and we draw one by
            # one.
            "CMA_mirrors": 0,
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,  # NaN: leave numpy's global generator alone
            "tolx": PRECISION,
            # Differences of losses mean nothing here: a strictly increasing transformation must
            # change nothing.
            "tolfun": 0,
            "tolfunhist": 0,
            "signals_filename": None,
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
        }
        if scale is not None:
            options["CMA_stds"] = np.resize(scale, max(start.size, 2))
        with _quiet():
            # pycma has no one-dimensional mode: a second coordinate that nothing depends on stands
            # in.
            self._cma: Any = cma.CMAEvolutionStrategy(
                np.resize(self.sample_at(start), max(start.size, 2)), sigma, options
            )

    def enlarged(self, population: int) -> Engine:
        """The same Gaussian with another population; its evolution paths begin anew."""
        other = Engine(self.mean, self._cma.sigma, population, self._separable, self._rng)
        other._cma.sm = self._cma.sm
        other._cma.sigma_vec = self._cma.sigma_vec
        other._cma._updateBDfromSM(other._cma.sm)
        return other

    @property
    def mean(self) -> Point:
        """Mean of the Gaussian, in the unit cube ``(dim,)``."""
        return self.unit_of(np.array(self._cma.mean))

    @property
    def spread(self) -> float:
        """Geometric mean of the standard deviations of the coordinates."""
        return float(np.exp(np.mean(np.log(self._cma.stds))))

    @property
    def stopped(self) -> bool:
        """Whether the run has converged, or cannot go on for numerical reasons."""
        return bool(self._cma.stop())

    def draw(self) -> Point:
        """A sample in unbounded coordinates ``(dim,)``."""
        with _quiet():
            return np.array(self._cma.ask(1)[0])

    def update(self, samples: Sequence[Point], losses: Sequence[float]) -> None:
        """Adapt to the samples in the order of their losses.

        Samples that were not drawn here are moved nearer to the mean.
        """
        with _quiet():
            if self._cma._flgtelldone:
                # Two updates without an ask between them are refused by pycma: draw one and discard
                # it.
                self._cma.ask(1)
            self._cma.tell(list(samples), list(losses))

    def sample_at(self, unit: Point) -> Point:
        """Unit cube ``(dim,)`` to unbounded coordinates."""
        inside = np.array(self._transform.inverse(unit))
        return np.resize(inside, max(inside.size, 2))

    def unit_of(self, sample: Point) -> Point:
        """Unbounded coordinates to the unit cube ``(dim,)``."""
        return np.array(self._transform.transform(sample[: self._dim]))


class _Absent(MetaPathFinder):
    """Packages that the imports of one thread do without, though they are installed."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._thread = get_ident()

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Refuse the names to this thread, and leave all else to others."""
        if fullname in self._names and get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname}: not needed here", name=fullname)


def _pycma() -> Any:
    """The package of pycma, without what it imports for plots and for models of the losses.

    Importing these takes 20 times as long as the rest. pycma does without them where they are not
    installed; to it they are not.
    """
    absent = _Absent(OPTIONAL)
    sys.meta_path.insert(0, absent)
    try:
        with _quiet():
            import cma
            import cma.transformations
    finally:
        sys.meta_path.remove(absent)
    return cma


def _quiet() -> warnings.catch_warnings[None]:
    """Silence pycma's advice (flat fitness, options), which users of a study cannot act on."""
    return warnings.catch_warnings(action="ignore")
