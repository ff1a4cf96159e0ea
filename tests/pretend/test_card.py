"""The pretend card is like a card where the product could tell the difference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mergesearch.merging import InputError
from mergesearch.merging.tensors.accelerator import (
    ACCELERATOR,
    accelerator,
    device_here,
    device_or_cpu,
)
from tests.pretend.device import NAME, Cards

#: Bytes of a test's tensors.
SIZE = 4096


def ones(card: int = 0) -> torch.Tensor:
    """A tensor of ``SIZE`` bytes on a card."""
    return torch.ones(SIZE // 4, device=f"{NAME}:{card}")


def test_tensors_of_several_devices_are_refused(cards: Cards) -> None:
    for other, device in ((torch.ones(SIZE // 4), "cpu"), (ones(1), f"{NAME}:1")):
        with pytest.raises(RuntimeError, match=f"same device.*{NAME}:0 and {device}"):
            ones() + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([ones(), other])
    with pytest.raises(TypeError, match="can't convert"):
        ones().numpy()
    assert (ones() * torch.tensor(2.0))[torch.tensor([3])].item() == 2


def test_memory_is_counted_for_each_card_and_freed(cards: Cards) -> None:
    before = cards.live(0)
    with cards.peak(0) as peak, cards.peak(1) as other:
        held = ones()
        assert cards.live(0) == before + SIZE
        held = held + 1  # both are there for a moment
        assert cards.live(0) == before + SIZE
    assert peak == [2 * SIZE]
    assert other == [0]
    del held
    assert cards.live(0) == before


def test_views_share_memory_and_results_do_not(cards: Cards) -> None:
    tensor = ones()
    before = cards.live()
    with cards.counting() as counted:
        views = [
            tensor[4:],
            tensor.view(2, -1).t(),
            tensor.view(torch.int32),
            tensor.unfold(0, 2, 1),
        ]
        assert cards.live() == before
    assert counted.operations == 0
    first = tensor.data_ptr()
    assert all(first <= view.data_ptr() < first + SIZE for view in views)
    views[0].zero_()
    assert tensor.sum().item() == 4
    assert (tensor + 0).data_ptr() != first


def test_a_limit_is_kept_by_allocations_and_by_results(cards: Cards) -> None:
    before = cards.live()
    held = ones()
    cards.limit(before + 2 * SIZE)
    for too_much in (
        lambda: torch.zeros(2 * SIZE, device=NAME),
        lambda: torch.cat([held, held]),
        lambda: torch.nonzero(held),
    ):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            too_much()
    assert cards.live() == before + SIZE
    assert torch.accelerator.get_memory_info(0) == (SIZE, before + 2 * SIZE)
    held = held * 2  # fits beside it
    cards.limit(0)
    assert torch.cat([held, held]).sum().item() == SIZE


def test_copies_and_synchronisations_are_counted(cards: Cards) -> None:
    with cards.counting() as counted:
        tensor = torch.ones(SIZE // 4).to(NAME)
    assert (counted.host_to_device, counted.synchronisations) == (SIZE, 0)
    waiting = (
        lambda: tensor.cpu(),
        lambda: tensor.sum().item(),
        lambda: bool(tensor.isfinite().all()),
        lambda: tensor[tensor > 0],
        lambda: torch.nonzero(tensor),
        lambda: torch.accelerator.synchronize(),
    )
    for action in waiting:
        with cards.counting() as counted:
            action()
        assert counted.synchronisations == 1
    pinned = torch.empty(SIZE // 4, pin_memory=True)
    with cards.counting() as counted:
        pinned.copy_(tensor, non_blocking=True)
        tensor.copy_(pinned, non_blocking=True)
        tensor[torch.tensor([1], device=NAME)] + 1
    assert (counted.device_to_host, counted.synchronisations) == (SIZE, 0)


def test_a_broken_card_fails_in_everything_and_the_other_one_in_nothing(cards: Cards) -> None:
    tensor = ones()
    cards.break_after(1)
    tensor += 1
    for action in (
        lambda: tensor + 1,
        lambda: tensor.cpu(),
        lambda: torch.empty(1, device=NAME),
        lambda: torch.accelerator.synchronize(0),
    ):
        with pytest.raises(torch.AcceleratorError, match="CUDA error: an illegal memory access"):
            action()
    assert ones(1).sum().item() == SIZE // 4
    cards.reset()
    assert tensor.sum().item() == SIZE // 2


def test_moving_and_copying_a_module_keeps_its_ties_and_parameters(cards: Cards) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weight = model[0].weight
    model.to(NAME)
    copied = copy.deepcopy(model)
    back = copy.deepcopy(copied).cpu()
    for each in (model, copied, back):
        assert each[0].weight is each[1].weight
    assert model[0].weight is weight
    assert weight.device == torch.device(NAME, 0)
    assert copied[0].weight.data_ptr() != weight.data_ptr()
    assert torch.equal(back[0].weight, weight.cpu())


def test_results_and_gradients_have_the_bits_of_the_cpu(cards: Cards) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.BatchNorm2d(4))
    pixels = torch.randn(2, 1, 8, 8, generator=generator)
    mask = torch.rand(8, 8, generator=generator) > 0.3

    def run(device: str) -> list[torch.Tensor]:
        each = copy.deepcopy(model).to(device)
        heads = each(pixels.to(device))
        seen = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, attn_mask=mask.to(device)
        )
        seen.square().sum().backward()
        return [seen.detach().cpu(), *(parameter.grad.cpu() for parameter in each.parameters())]

    for one, other in zip(run(NAME), run("cpu"), strict=True):
        assert torch.equal(one, other)


def test_kernels_that_resize_their_result_and_random_numbers(cards: Cards) -> None:
    assert torch.arange(5, device=NAME).tolist() == [0, 1, 2, 3, 4]
    out = torch.empty(0, device=NAME)
    torch.cat([ones(), ones()], out=out)
    assert out.shape == (SIZE // 2,)
    seeded = torch.Generator(NAME).manual_seed(3)
    expected = torch.randn(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.randn(4, device=NAME, generator=seeded).cpu(), expected)


def test_a_machine_without_cards_has_no_accelerator(cards: Cards) -> None:
    assert accelerator() == device_here(ACCELERATOR) == device_or_cpu(ACCELERATOR) == NAME
    assert device_here("cpu") == device_or_cpu("cpu") == "cpu"
    cards.count(0)
    assert accelerator() is None
    assert device_or_cpu(ACCELERATOR) == "cpu"
    with pytest.raises(InputError, match=r"workers\.gpus: expected a GPU .*found none"):
        device_here(ACCELERATOR)


def test_a_process_sees_the_cards_that_it_is_shown(
    cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    cards.reset()
    properties = torch.get_device_module(NAME).get_device_properties(0)
    assert torch.accelerator.device_count() == 1
    assert (properties.name, properties.uuid) == ("pretend card 1", "PRETEND-1")


def test_the_environment_breaks_and_limits_cards(
    cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_CARDS", "3")
    monkeypatch.setenv("PRETEND_CARD_BROKEN", "1:2")
    monkeypatch.setenv("PRETEND_CARD_LIMIT", str(SIZE))
    cards.reset()
    held = [ones(1), ones(2)]
    with pytest.raises(torch.OutOfMemoryError):
        ones(2)
    with pytest.raises(torch.AcceleratorError):
        held[0] += 1
    held[1] += 1


def test_numbers_on_the_host_are_other_memory(cards: Cards) -> None:
    host = np.ones(4, dtype=np.float32)
    tensor = torch.from_numpy(host).to(NAME)
    host[:] = 0
    assert tensor.sum().item() == 4
