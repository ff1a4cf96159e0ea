"""The router of Twin-Merging: which expert an item belongs to, by features of the shared merge."""

from __future__ import annotations

import torch
from torch import nn


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
