"""Concrete subspace: one learned mask for all task vectors.

Tang 2023, "Concrete subspace learning based interference elimination for multi-task model fusion":
every element of the model has a logit x, learned so that the merged model is sure of its answers.
In each step:

1. Draw relaxed Bernoulli masks m = σ((log u − log(1 − u) + x) / T) with u uniform in (0, 1).
2. Let the model base + λ Σ_k (m / mean m) ⊙ τ_k (mean m per tensor) answer one batch of every task.
3. Move x down the gradient of the mean entropy of the answers, by Adam.

Coefficient λ reproduces the merge that was learned on.

The authors' final model uses one more random mask. Here it is σ(x / T), the mask of the median draw
u = 1/2, likewise divided by its mean: the merge is then a function of what was learned. The noise
is counter-based, keyed by seed, step and tensor name. Gradients with respect to x follow from those
with respect to the weights tensor by tensor, so nothing but one forward pass is ever
differentiated. Running statistics and other buffers are not masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import CalibrationOption, refuse_calibration
from mergesearch.merging.models.expert_runner import ExpertRunner, answers
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.masks import uniform_bits
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.operators.task_arithmetic import TASK_ARITHMETIC
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Learning:
    """How logits are learned.

    Attributes:
        steps: Steps of Adam.
        learning_rate: Of Adam.
        temperature: T.
        scale: λ.
        seed: Seed of the draws of masks.
    """

    steps: int
    learning_rate: float
    temperature: float
    scale: float
    seed: int


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    calibration: Annotated[
        CalibrationOption,
        Field(description="Unlabelled items to learn on, and the model that runs them."),
    ],
    steps: Annotated[
        int, Field(ge=0, description="Steps of Adam; 0 leaves the task vectors unmasked.")
    ] = 2000,
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of Adam.")] = 1e-3,
    temperature: Annotated[
        float, Field(gt=0, description="T of the relaxed Bernoulli distribution.")
    ] = 0.5,
    scale: Annotated[
        float, Field(gt=0, le=1, description="Coefficient λ while the mask is learned.")
    ] = 0.3,
    seed: Annotated[int, Field(ge=0, description="Seed of the draws of masks.")] = 0,
) -> Basis:
    """Task vectors times the learned mask.

    While the mask is learned, memory holds the model and its gradient, and per element of the model
    the summed task vector, the logit with its two moments, and the drawn mask.
    """
    runner = ExpertRunner(calibration, base, experts, own_heads=True)
    names = [expert.name for expert in experts]
    learning = _Learning(steps, learning_rate, temperature, scale, seed)
    learned = memoised_per_tensor(
        (base, *experts),
        runner.key(["concrete", *astuple(learning)], names),
        partial(_learned, runner, experts, learning),
    )

    def rows(name: str) -> list[torch.Tensor]:
        deltas = task_vectors(base, experts, name)
        logits = learned(name).get("logits")
        if logits is None:
            return deltas
        # σ(x / T), and (m / mean m) ⊙ τ_k
        mask = (logits / temperature).sigmoid().to(deltas[0].device)
        return [delta.mul_(mask / mask.mean()) for delta in deltas]

    return Basis("delta", len(experts), rows)


def _learned(runner: ExpertRunner, experts: Sequence[TensorSource], learning: _Learning) -> Pieces:
    """Logits x of every parameter."""
    import torch

    temperature = learning.temperature
    changes = _summed_changes(runner, experts, learning.scale)
    logits = {name: torch.zeros_like(change) for name, change in changes.items()}
    batches = [runner.items(expert.name) for expert in experts]
    optimiser = torch.optim.Adam(list(logits.values()), lr=learning.learning_rate)
    for step in range(learning.steps):
        masks = {}
        for name, change in changes.items():
            # θ_0 + λ Σ_k (m / mean m) ⊙ τ_k
            masks[name] = _drawn(logits[name], temperature, learning.seed, step, name)
            runner.load_one(
                name, runner.base.read(name).to(change) + change * masks[name] / masks[name].mean()
            )
        runner.model.zero_grad()
        for own in batches:
            torch.autograd.backward(_entropy(runner, own[step % len(own)]))
        for name, mask in masks.items():
            logits[name].grad = _gradient(runner, name, changes[name], mask, temperature)
        optimiser.step()
    for name, values in logits.items():
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"calibration: expected finite gradients of tensor {name!r}, received NaN or "
                "infinity; check the experts and the items"
            )
        yield name, {"logits": values.cpu()}


def _summed_changes(
    runner: ExpertRunner, experts: Sequence[TensorSource], scale: float
) -> dict[str, torch.Tensor]:
    """``λ Σ_k τ_k`` of every parameter, on the model's device.

    Buffers, which are not masked, are merged into the model here.
    """
    import torch

    changes = {}
    for name, view in runner.views.items():
        deltas = task_vectors(runner.base, experts, name)
        change = sum(deltas[1:], deltas[0]) * scale
        if isinstance(runner.tensors[view.parameter], torch.nn.Parameter):
            changes[name] = change.to(runner.tensors[view.parameter].device)
        else:
            runner.load_one(name, runner.base.read(name).to(change) + change)
    return changes


def _drawn(
    logits: torch.Tensor, temperature: float, seed: int, step: int, name: str
) -> torch.Tensor:
    """A relaxed Bernoulli mask ``σ((log u − log(1 − u) + x) / T)`` in the shape of ``logits``."""
    import torch

    bits = uniform_bits(seed, f"step {step}", name, 0, logits.numel()).astype("float64")
    uniform = torch.from_numpy((bits + 0.5) / 2.0**32).reshape(logits.shape)
    return ((uniform.logit().to(logits) + logits) / temperature).sigmoid()


def _entropy(runner: ExpertRunner, items: Items) -> torch.Tensor:
    """``−Σ_c p_c log p_c``, the mean over the answers to a batch."""
    log_p = answers(runner.run(items), items.inputs).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def _gradient(
    runner: ExpertRunner, name: str, change: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor | None:
    """Gradient with respect to x, from that with respect to the weights of the model.

    The weights are θ_0 + c ⊙ m / mean m with ``change`` c. With their gradient g and b = g ⊙ c:
    ∂L/∂m = (b − mean(b ⊙ m) / mean m) / mean m, and ∂m/∂x = m (1 − m) / T.
    """
    view = runner.views[name]
    whole = runner.tensors[view.parameter].grad
    if whole is None:
        return None
    by_ratio = view.of(whole).to(change) * change
    mean = mask.mean()
    by_mask = (by_ratio - (by_ratio * mask).mean() / mean) / mean
    return by_mask * mask * (1 - mask) / temperature


CONCRETE = Operator(
    name="concrete",
    prepare=prepare,
    summary="task vectors under one mask, learned from unlabelled items",
    paper="Tang 2023, Concrete subspace learning based interference elimination for multi-task "
    "model fusion",
    family="learned",
    scope="S",
    identities=frozenset({"base_at_zero", "permutation", "linearity"}),
    default=lambda _experts, options: float(options["scale"]),
    bounds=lambda _experts, _options: (0.0, 1.0),
    needs=frozenset({"unlabeled"}),
    refuse=refuse_calibration,
    copies=lambda experts: 2 * experts + 4,
    plain={"steps": 0},
    plain_identities=TASK_ARITHMETIC.identities,
    stochastic=True,
)
