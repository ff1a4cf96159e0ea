"""Models whose weights depend on their input: merged anew for every batch, or every item.

Such a merge is no checkpoint. It holds the tensors that it is merged from, and answers as a model
does::

    routed(pixel_values=images).logits

T3 (Imam 2025, "T3: Test-Time Model Merging in VLMs for Zero-Shot Medical Imaging Analysis")
interpolates between two models by how much they disagree. Twin-Merging (Lu 2024, "Twin-Merging:
Dynamic Integration of Modular Expertise in Model Merging") adds low-rank vectors of the experts to
a shared merge, by the weights that a router gives them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergesearch.merging.errors import NonFiniteError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Answer:
    """The output of a routed model.

    Attributes:
        logits: ``(items, classes)``.
        weights: How every item was merged ``(items, weights)``, float64.
    """

    logits: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A tensor as ``left @ right``, reshaped.

    ``right`` is None for one that is kept whole in ``left``.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    shape: tuple[int, ...]

    def dense(self) -> torch.Tensor:
        """The tensor itself."""
        return self.left if self.right is None else (self.left @ self.right).view(self.shape)


class Routed(nn.Module, ABC):
    """A model that is merged for its inputs.

    Args:
        model: The model whose weights are written; it belongs to this one from now on.
        per: Merge for every ``item``, or once for a ``batch``, by the mean of what its items ask
            for.
    """

    def __init__(self, model: nn.Module, per: str) -> None:
        super().__init__()
        self.model = model
        self.per = per
        self._targets = floating_tensors(model)

    @abstractmethod
    def item_weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How every item would be merged ``(items, weights)``, float64."""

    @abstractmethod
    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A merged tensor, in float32 or wider."""

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor | None = None, **inputs: torch.Tensor) -> Answer:
        """Logits of every item, by the model that is merged for it.

        Items with the same weights run together.
        """
        named = inputs if pixel_values is None else {"pixel_values": pixel_values, **inputs}
        weights = self.item_weights(named)
        if self.per == "batch":
            weights = weights.mean(dim=0, keepdim=True).expand_as(weights)
        rows, owner = torch.unique(weights, dim=0, return_inverse=True)
        logits: torch.Tensor | None = None
        for index, row in enumerate(rows.tolist()):
            self.write(row)
            chosen = torch.nonzero(owner == index).flatten()
            part = self.model(**{key: value[chosen] for key, value in named.items()}).logits
            logits = part.new_empty(len(owner), *part.shape[1:]) if logits is None else logits
            logits[chosen] = part
        assert logits is not None, "a batch has at least one item"
        return Answer(logits, weights)

    @torch.no_grad()
    def write(self, weights: Sequence[float]) -> None:
        """Merge with ``weights`` into the model.

        Raises:
            NonFiniteError: If a merged tensor holds NaN or infinity.
        """
        for name, target in self._targets.items():
            target.copy_(self.merged_tensor(name, weights))
            if not bool(torch.isfinite(target.sum())) and not bool(torch.isfinite(target).all()):
                raise NonFiniteError(f"tensor {name!r}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving or casting gives the model other memory.
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._targets = floating_tensors(self.model)
        return moved

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, target in self._targets.items():
            target.copy_(tensors[name])


class T3(Routed):
    """``(1 - λ) base + λ expert``, with λ by how much the predictions of the two diverge.

    ``λ(x) = low + (high - low) · sigmoid(gamma · JS(p_base ‖ p_expert))``. Divergences are not
    negative, so that the published sigmoid is never below 1/2; ``centred`` (ours, not the paper's)
    takes ``2 · sigmoid - 1``, by which models that agree get ``low``. Here λ weights the expert: a
    merge that defers to the base where the two disagree, as the paper describes, has
    ``high < low``.

    Args:
        model: The model whose weights are written.
        base, expert: The two, by name in the model.
        low, high, gamma: Of the rule; ``lambda_min`` and ``lambda_max`` in the paper.
        per: ``item`` or ``batch`` (by the mean divergence).
        centred: See above.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Tensors,
        expert: Tensors,
        *,
        low: float,
        high: float,
        gamma: float,
        per: str = "item",
        centred: bool = False,
    ) -> None:
        super().__init__(model, per)
        self._base = base
        self._expert = expert
        self._low = low
        self._high = high
        self._gamma = gamma
        self._centred = centred

    def item_weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """λ of every item: ``(items, 1)``.

        Where a batch is merged once, every item has that of the mean divergence.
        """
        self._load(self._base)
        base = self.model(**inputs).logits
        self._load(self._expert)
        apart = js_divergence(base, self.model(**inputs).logits)
        if self.per == "batch":
            apart = apart.mean().expand_as(apart)
        return self.interpolation(apart)[:, None]

    def interpolation(self, divergence: torch.Tensor) -> torch.Tensor:
        """λ at a divergence, of any shape."""
        share = torch.sigmoid(self._gamma * divergence)
        return self._low + (self._high - self._low) * (2 * share - 1 if self._centred else share)

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """The interpolation of one tensor."""
        return torch.lerp(wide(self._base[name]), wide(self._expert[name]), weights[0])


class TwinMerging(Routed):
    """``shared + Σ w_k v_k``, with weights w that a router gives for each item.

    w is the softmax of the router's logits, which it makes of the mean last hidden state of the
    shared model.

    Args:
        model: The model whose weights are written.
        shared: The shared merge, by name in the model.
        exclusive: What each expert has beyond it.
        router: Its logits, from features ``(items, width)``.
        temperature: Of the softmax; towards 0 the expert with the greatest logit alone counts.
        per: ``item`` or ``batch``.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: Tensors,
        exclusive: Sequence[Mapping[str, LowRank]],
        router: nn.Module,
        *,
        temperature: float,
        per: str = "item",
    ) -> None:
        super().__init__(model, per)
        self.exclusive = exclusive
        self.router = router
        self._shared = shared
        self._temperature = temperature
        self._dense = [
            {name: part.dense() for name, part in vector.items()} for vector in exclusive
        ]

    def item_weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The router's weights ``(items, experts)``."""
        self._load(self._shared)
        logits: torch.Tensor = self.router(features(self.model, inputs)).double()
        return torch.softmax(logits / self._temperature, dim=1)

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """The shared tensor and the weighted exclusive ones."""
        total = wide(self._shared[name]).clone()
        for weight, vector in zip(weights, self._dense, strict=True):
            total.add_(vector[name], alpha=weight)
        return total


def js_divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the predictions of two logits, in nats.

    ``(items, classes)`` -> float64 ``(items,)``.
    """
    log_p, log_q = (torch.log_softmax(logits.double(), dim=1) for logits in (one, other))
    log_mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    halves = [(log.exp() * (log - log_mean)).sum(dim=1) for log in (log_p, log_q)]
    # Rounding may leave the least bit below zero.
    return ((halves[0] + halves[1]) / 2).clamp_min(0.0)


def floating_tensors(model: nn.Module) -> Tensors:
    """Name -> the memory of every distinct floating parameter and stored buffer of a model."""
    seen: set[object] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.is_floating_point() and tensor.numel() and memory not in seen:
            seen.add(memory)
            tensors[name] = tensor
    return tensors


def copied_tensors(model: nn.Module) -> Tensors:
    """Copies of :func:`floating_tensors`, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in floating_tensors(model).items()}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def exclusive_vector(
    expert: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], rank: float
) -> Any:
    """Name -> low-rank difference of an expert from the shared merge.

    Matrices (and kernels, seen as matrices of one row per output) keep the share ``rank`` of their
    singular values, at least one; vectors and scalars stay whole.
    """
    return {
        name: low_rank(wide(tensor) - wide(shared[name]), rank) for name, tensor in expert.items()
    }


def low_rank(tensor: torch.Tensor, rank: float) -> LowRank:
    """The tensor with the share ``rank`` of its greatest singular values, at least one."""
    if tensor.ndim < 2:
        return LowRank(tensor, None, tuple(tensor.shape))
    left, values, right = torch.linalg.svd(tensor.reshape(tensor.shape[0], -1), full_matrices=False)
    kept = max(1, round(rank * len(values)))
    return LowRank(
        (left[:, :kept] * values[:kept]).contiguous(),
        right[:kept].contiguous(),
        tuple(tensor.shape),
    )


@torch.no_grad()
def features(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean last hidden state of every item: float32 ``(items, width)``.

    Over tokens, or over positions of an image.
    """
    state: torch.Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
    if state.ndim == 4:
        return state.mean(dim=(2, 3))
    return state.mean(dim=1) if state.ndim == 3 else state


def make_router(inputs: int, width: int, experts: int) -> nn.Sequential:
    """A router without weights: one hidden layer with batch norm."""
    with torch.device("meta"):  # where nothing is drawn
        first = nn.Linear(inputs, width)
        last = nn.Linear(width, experts)
    router = nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), last)
    for layer in (first, last):
        layer.to_empty(device="cpu")
    return router


def train_router(
    points: torch.Tensor,
    labels: torch.Tensor,
    experts: int,
    *,
    width: int,
    steps: int,
    seed: int,
    rate: float = 1e-2,
) -> nn.Sequential:
    """Train a router to tell which expert a point belongs to.

    Every step of Adam is on all points at once.

    Draws from its own generator alone, so that the same points give the same router.

    Args:
        points: Features ``(items, inputs)``.
        labels: Numbers of experts ``(items,)``.
        experts: Their number.
        width: Hidden width.
        steps: Steps on all points.
        seed: Of the first weights.
        rate: Learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    device = points.device
    router = make_router(points.shape[1], width, experts)
    for layer, inputs in ((router[0], points.shape[1]), (router[3], width)):
        bound = inputs**-0.5
        for parameter in layer.parameters():
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.data = (2 * drawn - 1) * bound
    router.to(device).train()
    points = points.clone()
    labels = labels.to(device)
    with torch.enable_grad():
        optimiser = torch.optim.Adam(router.parameters(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(router(points), labels)
            torch.autograd.backward(loss)
            optimiser.step()
    return router.eval().requires_grad_(False)
