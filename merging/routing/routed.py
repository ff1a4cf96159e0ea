"""Models whose weights depend on their input: merged anew for every batch, or every item.

Such a merge is no checkpoint. It holds the tensors that it is merged from, and answers as a model
does::

    routed(pixel_values=images).logits
    routed(pixel_values=images, tasks="cars").logits    # with a head of class prompts

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
from mergesearch.merging.models.own_heads import OwnHeads
from mergesearch.merging.models.task_heads import OwnHead, TaskHead, Tasks, wide

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Answer:
    """The output of a routed model.

    Attributes:
        logits: ``(items, classes)``; minus infinity for classes that an item's task lacks.
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
        head: What answers by the model; None: the model itself.
    """

    def __init__(self, model: nn.Module, per: str, head: TaskHead | None = None) -> None:
        super().__init__()
        self.model = model
        self.per = per
        self.head: TaskHead = head or OwnHead()
        self._targets = self._shared_tensors()

    @abstractmethod
    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """How every item would be merged ``(items, weights)``, float64."""

    @abstractmethod
    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A merged tensor, in float32 or wider."""

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        tasks: Tasks = None,
        **inputs: torch.Tensor,
    ) -> Answer:
        """Logits of every item, by the model that is merged for it.

        Items with the same weights run together.

        Args:
            pixel_values: Images, if the model reads any.
            tasks: The task of each item, or of all, where the head has several.
            **inputs: Other arguments of the model.
        """
        named = inputs if pixel_values is None else {"pixel_values": pixel_values, **inputs}
        weights = self.item_weights(named, tasks)
        if self.per == "batch":
            weights = weights.mean(dim=0, keepdim=True).expand_as(weights)
        rows, owner = torch.unique(weights, dim=0, return_inverse=True)
        parts = []
        for index, row in enumerate(rows.tolist()):
            self.write(row)
            chosen = torch.nonzero(owner == index).flatten()
            own = _of_items(tasks, chosen)
            batch = {key: value[chosen] for key, value in named.items()}
            parts.append((chosen, self.head.answer(self.model, batch, own).logits))
        return Answer(_together(parts), weights)

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
        if isinstance(self.head, OwnHeads):
            self.head.apply(fn)
        self._targets = self._shared_tensors()
        return moved

    def _shared_tensors(self) -> Tensors:
        """The memory of all tensors but those of heads."""
        return without_heads(floating_tensors(self.model), self.head)

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
        head: What answers by the model; None: the model itself.
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
        head: TaskHead | None = None,
    ) -> None:
        super().__init__(model, per, head)
        self._base = base
        self._expert = expert
        self._low = low
        self._high = high
        self._gamma = gamma
        self._centred = centred

    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """λ of every item: ``(items, 1)``.

        Where a batch is merged once, every item has that of the mean divergence.
        """
        self._load(self._base)
        base = self.head.answer(self.model, inputs, tasks).logits
        self._load(self._expert)
        apart = js_divergence(base, self.head.answer(self.model, inputs, tasks).logits)
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

    w is the softmax of the router's logits, which it makes of the features of the shared model: its
    mean last hidden state or, with class prompts, the features of the image.

    Args:
        model: The model whose weights are written.
        shared: The shared merge, by name in the model.
        exclusive: What each expert has beyond it.
        router: Its logits, from features ``(items, width)``.
        temperature: Of the softmax; towards 0 the expert with the greatest logit alone counts.
        per: ``item`` or ``batch``.
        head: What answers by the model; None: the model itself.
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
        head: TaskHead | None = None,
    ) -> None:
        super().__init__(model, per, head)
        self.exclusive = exclusive
        self.router = router
        self._shared = shared
        self._temperature = temperature
        self._dense = [
            {name: part.dense() for name, part in vector.items()} for vector in exclusive
        ]

    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """The router's weights ``(items, experts)``; tasks make no difference to them."""
        self._load(self._shared)
        logits: torch.Tensor = self.router(self.head.features(self.model, inputs)).double()
        return torch.softmax(logits / self._temperature, dim=1)

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """The shared tensor and the weighted exclusive ones."""
        total = wide(self._shared[name]).clone()
        for weight, vector in zip(weights, self._dense, strict=True):
            total.add_(vector[name], alpha=weight)
        return total


def js_divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the predictions of two logits, in nats.

    ``(items, classes)`` -> float64 ``(items,)``. Classes whose logits are minus infinity add 0.
    """
    log_p, log_q = (torch.log_softmax(logits.double(), dim=1) for logits in (one, other))
    log_mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    halves = [
        torch.where(log.isneginf(), 0.0, log.exp() * (log - log_mean)).sum(dim=1)
        for log in (log_p, log_q)
    ]
    # Rounding may leave the least bit below zero.
    return ((halves[0] + halves[1]) / 2).clamp_min(0.0)


def _of_items(tasks: Tasks, chosen: torch.Tensor) -> Tasks:
    """The tasks of some items."""
    if tasks is None or isinstance(tasks, str):
        return tasks
    return [str(tasks[index]) for index in chosen.tolist()]


def _together(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Logits of all items, from indices and logits of parts, which may have fewer classes."""
    count = sum(len(chosen) for chosen, _ in parts)
    widest = max((part for _, part in parts), key=lambda part: part.shape[1])
    logits = widest.new_full((count, *widest.shape[1:]), float("-inf"))
    for chosen, part in parts:
        logits[chosen, : part.shape[1]] = part
    return logits


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


def without_heads(tensors: Tensors, head: TaskHead) -> Tensors:
    """The tensors that are merged, where experts have heads of their own."""
    private = head.private if isinstance(head, OwnHeads) else ()
    return {name: tensor for name, tensor in tensors.items() if name not in private}


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
