"""Concrete subspace: one learned mask for all task vectors.

Tang 2023, "Concrete subspace learning based interference elimination for multi-task model fusion":
every element of the model has a logit x, learned so that the merged model is sure of its answers.
In each step:

1. Draw relaxed Bernoulli masks m = σ((log u − log(1 − u) + x) / T) with u uniform in (0, 1).
2. Let the model base + λ Σ_k (m / mean m) ⊙ τ_k (mean m per tensor) answer one batch of every task.
3. Move x down the gradient of the mean entropy of the answers, by Adam.

Coefficient λ reproduces the merge that was learned on.

With ``inner`` the mask is learned for coefficients that adapt to it (Concrete AdaMerging): before
step 2 one λ_k for each expert (``task``), or for each expert and tensor (``tensor``), takes a step
from λ down the gradient of the same entropy, on another batch. Step 3 is made at these λ_k, and
they are then forgotten. What follows is AdaMerging under the finished mask: a study with this
operator and the strategy ``adamerging``. The authors' code makes the inner step by Adam with rate
1, whose first step is 1 long whatever the gradient; here it is ``inner_rate`` times the gradient.

The authors' final model uses one more random mask. Here it is σ(x / T), the mask of the median draw
u = 1/2, likewise divided by its mean: the merge is then a function of what was learned. The noise
is counter-based, keyed by seed, step and tensor name. Gradients with respect to x follow from those
with respect to the weights tensor by tensor, so nothing but one forward pass is ever
differentiated. Running statistics and other buffers are not masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

    #: By name.
    Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Learning:
    """How logits are learned.

    Attributes:
        steps: Steps of Adam.
        learning_rate: Of Adam.
        temperature: T.
        scale: λ.
        seed: Seed of the draws of masks.
        inner: Which coefficients take a step before the mask does: ``none``, ``task``, ``tensor``.
        inner_rate: Length of that step, in gradients.
    """

    steps: int
    learning_rate: float
    temperature: float
    scale: float
    seed: int
    inner: str = "none"
    inner_rate: float = 1.0

    @property
    def key(self) -> list[Any]:
        """What the logits depend on."""
        plain, inner = astuple(self)[:5], astuple(self)[5:]
        return [*plain, *([] if self.inner == "none" else inner)]


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
    inner: Annotated[
        Literal["none", "task", "tensor"],
        Field(
            description="Coefficients that take one step before every step of the mask: none, one "
            "for each expert, or one for each expert and tensor."
        ),
    ] = "none",
    inner_rate: Annotated[
        float, Field(gt=0, description="Length of that step, in gradients.")
    ] = 1.0,
) -> Basis:
    """Task vectors times the learned mask.

    While the mask is learned, memory holds the model and its gradient, and per element of the model
    the summed task vector (with ``inner`` those of all experts), the logit with its two moments,
    and the drawn mask.
    """
    runner = ExpertRunner(calibration, base, experts, own_heads=True)
    names = [expert.name for expert in experts]
    learning = _Learning(steps, learning_rate, temperature, scale, seed, inner, inner_rate)
    learned = memoised_per_tensor(
        (base, *experts),
        runner.key(["concrete", *learning.key], names),
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
    vectors = _vectors(runner, experts, learning)
    logits = {name: torch.zeros_like(terms[0]) for name, terms in vectors.items()}
    batches = [runner.items(expert.name) for expert in experts]
    optimiser = torch.optim.Adam(list(logits.values()), lr=learning.learning_rate)
    for step in range(learning.steps):
        masks = {
            name: _drawn(one, temperature, learning.seed, step, name)
            for name, one in logits.items()
        }
        if learning.inner == "none":
            changes = {name: terms[0] for name, terms in vectors.items()}
            _answer(runner, changes, masks, [own[step % len(own)] for own in batches])
        else:
            first, second = (
                [own[n % len(own)] for own in batches] for n in (2 * step, 2 * step + 1)
            )
            changes = _adapted(runner, vectors, masks, first, learning)
            _answer(runner, changes, masks, second)
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


def _answer(
    runner: ExpertRunner, changes: Tensors, masks: Tensors, batches: Sequence[Items]
) -> None:
    """Gradients of the summed entropies with respect to weights θ_0 + c ⊙ m / mean m."""
    import torch

    for name, change in changes.items():
        mask = masks[name]
        runner.load_one(name, runner.base.read(name).to(change) + change * mask / mask.mean())
    runner.model.zero_grad()
    for items in batches:
        torch.autograd.backward(_entropy(runner, items))


def _adapted(
    runner: ExpertRunner,
    vectors: Mapping[str, Sequence[torch.Tensor]],
    masks: Tensors,
    batches: Sequence[Items],
    learning: _Learning,
) -> dict[str, torch.Tensor]:
    """``Σ_k λ_k τ_k`` after one step of the coefficients from λ, on batches of their own."""
    import torch

    start = {name: sum(terms[1:], terms[0]) * learning.scale for name, terms in vectors.items()}
    _answer(runner, start, masks, batches)
    slopes = {}
    for name, terms in vectors.items():
        ratio = masks[name] / masks[name].mean()
        # ∂L/∂λ_k = ⟨∂L/∂θ, (m / mean m) ⊙ τ_k⟩
        slope = _slope(runner, name, terms[0])
        slopes[name] = [
            0.0 if slope is None else float((slope * ratio * term).sum(dtype=torch.float64))
            for term in terms
        ]
    if learning.inner == "task":
        total = [sum(own) for own in zip(*slopes.values(), strict=True)]
        slopes = dict.fromkeys(slopes, total)
    changes = {}
    for name, terms in vectors.items():
        changes[name] = torch.zeros_like(terms[0])
        for number, term in zip(slopes[name], terms, strict=True):
            changes[name] += (learning.scale - learning.inner_rate * number) * term
    return changes


def _vectors(
    runner: ExpertRunner, experts: Sequence[TensorSource], learning: _Learning
) -> dict[str, list[torch.Tensor]]:
    """``λ Σ_k τ_k`` of every parameter, or with an inner level all τ_k, on the model's device.

    Buffers, which are not masked, are merged into the model here.
    """
    import torch

    vectors = {}
    for name, view in runner.views.items():
        deltas = task_vectors(runner.base, experts, name)
        change = sum(deltas[1:], deltas[0]) * learning.scale
        if isinstance(runner.tensors[view.parameter], torch.nn.Parameter):
            device = runner.tensors[view.parameter].device
            kept = [change] if learning.inner == "none" else deltas
            vectors[name] = [one.to(device) for one in kept]
        else:
            runner.load_one(name, runner.base.read(name).to(change) + change)
    return vectors


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


def _slope(runner: ExpertRunner, name: str, like: torch.Tensor) -> torch.Tensor | None:
    """The gradient with respect to a tensor of the model, None where there is none."""
    view = runner.views[name]
    whole = runner.tensors[view.parameter].grad
    return None if whole is None else view.of(whole).to(like)


def _gradient(
    runner: ExpertRunner, name: str, change: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor | None:
    """Gradient with respect to x, from that with respect to the weights of the model.

    The weights are θ_0 + c ⊙ m / mean m with ``change`` c. With their gradient g and b = g ⊙ c:
    ∂L/∂m = (b − mean(b ⊙ m) / mean m) / mean m, and ∂m/∂x = m (1 − m) / T.
    """
    slope = _slope(runner, name, change)
    if slope is None:
        return None
    by_ratio = slope * change
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
    when="with unlabelled items of every task, for models whose answers can be sure or unsure",
)
