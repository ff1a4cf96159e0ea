"""Layers fitted to features that several models have in common coordinates.

Nasery 2024, "PLeaS: Merging Models with Permutations and Least Squares", second step: with z_k the
inputs and o_k = W_k z_k + b_k the outputs of a layer in model k, the merged layer is the least
squares solution of ``W z + b ≈ o``, where z and o are the means of z_k and o_k over the models that
have the unit. Weights between units that different models keep apart stay 0.

The paper takes steps of Adam from the mean of the layers. Here the problem is solved, with a ridge
that pulls W towards that mean: it decides where items say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergesearch.merging.tensors.owned import Owned

if TYPE_CHECKING:
    import torch


@dataclass
class Moments:
    """Second moments of the inputs of a layer in all models, summed over items.

    Attributes:
        shares: Weight of each model in the mean input, ``(models, inputs)``.
        count: Number of inputs.
        mean: Σ z zᵀ of the mean input ``(inputs, inputs)``, and Σ z ``(inputs,)``.
        crosses: For each model Σ z_k zᵀ and Σ z_k.
    """

    shares: torch.Tensor
    count: int = 0
    mean: list[torch.Tensor] = field(default_factory=list)
    crosses: list[list[torch.Tensor]] = field(default_factory=list)

    def add(self, inputs: Sequence[torch.Tensor]) -> None:
        """Add inputs ``(vectors, inputs)`` of every model on the same items."""
        wide = [each.float() for each in inputs]
        shares = self.shares.to(wide[0])
        # One by one, so that models that agree give the bits of one.
        mean = sum(
            (share * (each - wide[0]) for share, each in zip(shares, wide, strict=True)),
            wide[0],
        )
        new = [[each.T @ mean, each.sum(0)] for each in (mean, *wide)]
        if not self.count:
            self.mean = new[0]
            self.crosses = new[1:]
        else:
            for kept, more in zip([self.mean, *self.crosses], new, strict=True):
                kept[0] += more[0]
                kept[1] += more[1]
        self.count += len(mean)


@dataclass(frozen=True)
class Layer:
    """A layer of several models, as matrices.

    Attributes:
        weights: For each model ``(outputs, inputs)``, in fp64.
        biases: For each model ``(outputs,)``, or None for a layer without them.
        inputs: Which inputs each model has ``(models, inputs)``, bool.
        outputs: Which outputs each model has ``(models, outputs)``, bool.
    """

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor] | None
    inputs: torch.Tensor
    outputs: torch.Tensor


def shares_of(owned: torch.Tensor) -> torch.Tensor:
    """Weight of each model in the mean of a unit, ``(models, units)``; the sum is 1."""
    wide = owned.double()
    return wide / wide.sum(0)


def owners(owned: Sequence[Owned], place: int, units: int) -> torch.Tensor:
    """Which units of a dimension each model has, ``(models, units)``, bool."""
    import torch

    whole = torch.ones(units, dtype=torch.bool)
    masks = [each[place] if each else None for each in owned]
    return torch.stack([whole if mask is None else mask for mask in masks])


def fitted(
    layer: Layer, moments: Moments, ridge: float
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The fitted layer as one part for each expert: what is to be added to the first model's.

    All parts together give the fit. The part of an expert is what the fit owes to its outputs, and
    its share of what it owes to those of the first model.

    Args:
        layer: The layer in all models, the first of which is the base.
        moments: Of its inputs.
        ridge: Relative to the mean of the diagonal of the second moments.

    Returns:
        Weight ``(outputs, inputs)`` and bias of each expert, in fp64.
    """
    import torch

    second, cross, means = _centred(moments, with_mean=layer.biases is not None)
    experts = len(layer.weights) - 1
    shares = shares_of(layer.outputs)
    # What each model adds to the products of the target with the mean input.
    targets = [
        share[:, None] * (weight @ own)
        for share, weight, own in zip(shares, layer.weights, cross, strict=True)
    ]
    read = layer.outputs.T.double() @ layer.inputs.double() > 0
    starts = [
        read * (weight + layer.weights[0] / experts) / (experts + 1) for weight in layer.weights[1:]
    ]
    gaps = [
        target + targets[0] / experts - start @ second
        for target, start in zip(targets[1:], starts, strict=True)
    ]
    solved = _solved(torch.stack(gaps), second, layer, ridge)
    parts = []
    for number, (start, step) in enumerate(zip(starts, solved, strict=True), 1):
        weight = start + step - layer.weights[0] / experts
        bias = None
        if layer.biases is not None:
            own = shares[number] * (layer.weights[number] @ means[number] + layer.biases[number])
            base = shares[0] * (layer.weights[0] @ means[0] + layer.biases[0])
            centre = sum(
                (
                    part * (each - means[0])
                    for part, each in zip(moments.shares, means, strict=True)
                ),
                means[0],
            )
            bias = own + base / experts - (start + step) @ centre - layer.biases[0] / experts
        parts.append((weight, bias))
    return parts


def _centred(
    moments: Moments, *, with_mean: bool
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Second moments of the mean input and of each model's with it, and each model's mean.

    Around the means where a bias takes these up.
    """
    count = moments.count
    centre = moments.mean[1].cpu().double() / count
    means = [total.cpu().double() / count for _, total in moments.crosses]

    def around(products: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        wide = products.cpu().double() / count
        return wide - mean[:, None] * centre if with_mean else wide

    second = around(moments.mean[0], centre)
    cross = [
        around(products, mean) for (products, _), mean in zip(moments.crosses, means, strict=True)
    ]
    return second, cross, means


def _solved(gaps: torch.Tensor, second: torch.Tensor, layer: Layer, ridge: float) -> torch.Tensor:
    """``gaps · (second + ridge)⁻¹`` with weights between units that are kept apart at 0.

    Args:
        gaps: ``(experts, outputs, inputs)``.
        second: ``(inputs, inputs)``.
        layer: Tells what is kept apart.
        ridge: Relative.
    """
    import torch

    solved = torch.zeros_like(gaps)
    # Outputs of the same models read the same inputs: at most one system for each of these sets.
    sets, members = torch.unique(layer.outputs.T, dim=0, return_inverse=True)
    for number, models in enumerate(sets):
        rows = (members == number).nonzero()[:, 0]
        columns = layer.inputs[models].any(0).nonzero()[:, 0]
        own = second[columns][:, columns]
        mean = float(own.diagonal().mean())
        added = ridge * mean if mean > 0 else 1.0
        matrix = own + added * torch.eye(len(own), dtype=own.dtype)
        right = gaps[:, rows][:, :, columns]
        found = torch.cholesky_solve(
            right.reshape(-1, len(columns)).T, _factor(matrix, added)
        ).T.reshape(right.shape)
        part = torch.zeros(len(gaps), len(rows), gaps.shape[-1], dtype=gaps.dtype)
        part[:, :, columns] = found
        solved[:, rows] = part
    return solved


def _factor(matrix: torch.Tensor, added: float) -> torch.Tensor:
    """Cholesky factor; rounding of fp32 sums can leave negative eigenvalues near 0."""
    import torch

    while True:
        factor: torch.Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            return factor
        matrix = matrix + 10 * added * torch.eye(len(matrix), dtype=matrix.dtype)
        added *= 10
