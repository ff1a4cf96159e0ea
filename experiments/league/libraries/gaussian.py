"""BoTorch: TuRBO for one objective, and noisy expected hypervolume improvement for several.

Both follow BoTorch's tutorials; a Gaussian process is fitted again for every batch of questions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.league.libraries.base import Array, Task


class _Modelled:
    """Questions near the start until the model can take over.

    Args:
        task: The problem.
    """

    def __init__(self, task: Task) -> None:
        # Imported here, as the CPU of imports is not that of questions.
        import botorch.fit
        import botorch.generation
        import botorch.optim  # noqa: F401
        import torch

        torch.manual_seed(task.seed)
        torch.set_num_threads(1)
        self.task = task
        self.points = list(task.points)
        self.losses = list(task.losses)
        self._first = list(task.draws(max(4, min(task.dim, task.budget // 6)))[1:])
        self._asked: list[Array] = []

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point."""
        point = self._first.pop() if self._first else self.propose()
        self._asked.append(point)
        return len(self._asked) - 1, point

    def tell(self, number: int, losses: Array) -> None:
        """The losses at a question's point."""
        self.points.append(self._asked[number])
        self.losses.append(losses)

    def best(self) -> Array | None:
        """Nothing beyond the best trial."""
        return None

    def propose(self) -> Array:
        """A point by the model ``(dim,)``."""
        raise NotImplementedError

    def data(self) -> tuple[Any, Any]:
        """Points and standardised values to maximise, as tensors of doubles."""
        import torch

        values = -np.array(self.losses)
        spread = np.maximum(values.std(axis=0), 1e-9)
        return torch.tensor(np.array(self.points)), torch.tensor(
            (values - values.mean(axis=0)) / spread
        )


class Turbo(_Modelled):
    """TuRBO-1 (Eriksson 2019) with Thompson sampling.

    Args:
        task: The problem.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._length = 0.8
        self._wins = 0
        self._failures = 0
        self._record = min(float(loss.mean()) for loss in task.losses)

    def tell(self, number: int, losses: Array) -> None:
        """The losses at a question's point; the trust region grows or shrinks."""
        super().tell(number, losses)
        loss = float(losses.mean())
        better = loss < self._record - 1e-3 * abs(self._record)
        self._record = min(self._record, loss)
        self._wins = self._wins + 1 if better else 0
        self._failures = 0 if better else self._failures + 1
        if self._wins >= 10:
            self._length = min(2.0 * self._length, 1.6)
            self._wins = 0
        if self._failures >= max(4, self.task.dim):
            self._length /= 2.0
            self._failures = 0
        if self._length < 0.5**7:
            self._length = 0.8

    def propose(self) -> Array:
        """A Thompson sample in the trust region ``(dim,)``."""
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.generation import MaxPosteriorSampling
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        points, values = self.data()
        values = values.mean(dim=1, keepdim=True)
        model = SingleTaskGP(points, values)
        fit_gpytorch_mll(
            ExactMarginalLogLikelihood(model.likelihood, model),
            optimizer_kwargs={"options": {"maxiter": 50}},
        )
        scales = _length_scales(model, self.task.dim)
        scales = scales / np.exp(np.log(scales).mean())
        # The centre is the best by the model's mean: observed values are noisy.
        with torch.no_grad():
            centre = points[model.posterior(points).mean.argmax()].numpy()
        low = np.clip(centre - scales * self._length / 2.0, 0.0, 1.0)
        high = np.clip(centre + scales * self._length / 2.0, 0.0, 1.0)
        candidates = self._candidates(centre, low, high)
        with torch.no_grad():
            chosen = MaxPosteriorSampling(model=model, replacement=False)(
                torch.tensor(candidates), num_samples=1
            )
        return np.asarray(chosen[0].numpy())

    def _candidates(self, centre: Array, low: Array, high: Array) -> Array:
        """Sobol points of the region, of which some coordinates replace the centre's."""
        from torch.quasirandom import SobolEngine

        dim = self.task.dim
        count = min(1000, max(200, 20 * dim))
        seed = len(self.points) + 10_000 * self.task.seed
        engine: Any = SobolEngine
        sobol = engine(dim, scramble=True, seed=seed).draw(count).double().numpy()
        rng = np.random.default_rng([self.task.seed, len(self.points)])
        mask = rng.random((count, dim)) <= min(20.0 / dim, 1.0)
        empty = np.flatnonzero(~mask.any(axis=1))
        mask[empty, rng.integers(dim, size=len(empty))] = True
        return np.where(mask, low + (high - low) * sobol, centre)


class Qnehvi(_Modelled):
    """Log noisy expected hypervolume improvement (Daulton 2021; Ament 2023).

    Args:
        task: The problem.
    """

    def propose(self) -> Array:
        """The point with the largest acquisition ``(dim,)``."""
        import torch
        from botorch.acquisition.multi_objective.logei import (
            qLogNoisyExpectedHypervolumeImprovement,
        )
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.optim import optimize_acqf
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        points, values = self.data()
        model = ModelListGP(
            *(SingleTaskGP(points, values[:, [index]]) for index in range(values.shape[1]))
        )
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        # Losses are in units of the anchors' range; the reference is the league's.
        raw = -np.array(self.losses)
        spread = np.maximum(raw.std(axis=0), 1e-9)
        reference = (-1.1 - raw.mean(axis=0)) / spread
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=reference.tolist(),
            X_baseline=points,
            prune_baseline=True,
            sampler=SobolQMCNormalSampler(torch.Size([64]), seed=self.task.seed),
        )
        bounds = torch.stack([torch.zeros(self.task.dim), torch.ones(self.task.dim)]).double()
        found, _ = optimize_acqf(
            acquisition, bounds, q=1, num_restarts=4, raw_samples=64, options={"maxiter": 50}
        )
        return np.asarray(found.detach()[0].numpy())


def _length_scales(model: Any, dim: int) -> Array:
    kernel = getattr(model.covar_module, "base_kernel", model.covar_module)
    scales = np.asarray(kernel.lengthscale.detach().numpy()).reshape(-1)
    return scales if scales.size == dim and math.isfinite(scales.sum()) else np.ones(dim)
