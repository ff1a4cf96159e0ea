"""The router of Twin-Merging: which expert an item belongs to, by features of the shared merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

#: What names of its tensors begin with in a bundle.
PREFIX = "router."


def make_router(inputs: int, width: int, experts: int) -> nn.Sequential:
    """A router without weights: one hidden layer with batch norm."""
    with torch.device("meta"):  # where nothing is drawn
        first = nn.Linear(inputs, width)
        last = nn.Linear(width, experts)
    router = nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), last)
    for layer in (first, last):
        layer.to_empty(device="cpu")
    return router


def router_tensors(router: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a router as a bundle stores them."""
    return {f"{PREFIX}{name}": tensor.cpu() for name, tensor in router.state_dict().items()}


def stored_router(stored: Mapping[str, torch.Tensor], experts: int) -> nn.Sequential:
    """The router among the tensors of a bundle, ready for use."""
    state = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in stored.items()
        if name.startswith(PREFIX)
    }
    width, inputs = state["0.weight"].shape
    router = make_router(inputs, width, experts)
    router.load_state_dict(state)
    return router.eval().requires_grad_(False)


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
