"""Rank selection by histograms, against a plain sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.operators.parts.magnitudes import (
    Histogram,
    count_kept,
    keep_from,
    keep_largest,
    kth_largest,
    largest_mask,
    magnitude_histogram,
)
from mergesearch.merging.tensors.memo import Memo


def numbers(dtype: torch.dtype, size: int = 3001) -> torch.Tensor:
    """Many scales, both signs, ties (bf16 has few numbers), zeros, subnormals."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
    tensor = (torch.randn(size, generator=generator) * scales).to(dtype)
    tensor[:50] = 0
    tensor[50:60] = torch.finfo(dtype).smallest_normal / 4
    tensor[60:80] = tensor[80]
    return tensor


def stream_of(tensor: torch.Tensor) -> Callable[[], list[tuple[str, torch.Tensor]]]:
    return lambda: [
        ("first", tensor[:1000].reshape(20, 50)),
        ("second", tensor[1000:1000]),
        ("third", tensor[1000:]),
    ]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_agrees_with_a_sort_at_every_kind_of_rank(dtype: torch.dtype, signed: bool) -> None:
    tensor = numbers(dtype)
    ordered = np.sort(tensor.double().numpy() if signed else tensor.double().abs().numpy())[::-1]
    first = magnitude_histogram(stream_of(tensor), signed=signed)
    assert first.total == tensor.numel()
    for rank in (1, 2, 37, 700, 1500, 2941, 2952, 3000, 3001):
        assert kth_largest(stream_of(tensor), rank, signed=signed, first=first) == ordered[rank - 1]
        assert kth_largest(stream_of(tensor), rank, signed=signed) == ordered[rank - 1]


def test_one_tensor_in_fp64_makes_the_ranking_exact_for_all() -> None:
    # Three numbers that are one in fp32.
    wide = torch.tensor([1 + 2.0**-40, 1 + 2.0**-41], dtype=torch.float64)
    magnitudes = [
        kth_largest(lambda: [("narrow", torch.tensor([-1.0, 0.5])), ("wide", wide)], rank)
        for rank in range(1, 5)
    ]
    assert magnitudes == [1 + 2.0**-40, 1 + 2.0**-41, 1.0, 0.5]


def test_reads_an_fp32_stream_twice_and_once_with_its_histogram() -> None:
    tensor = numbers(torch.float32)
    reads = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        reads.append(1)
        yield "w", tensor

    first = magnitude_histogram(stream)
    assert len(reads) == 1
    kth_largest(stream, 5, first=first)
    assert len(reads) == 2
    kth_largest(stream, 5)
    assert len(reads) == 4


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_the_tensor_that_cannot_be_ranked(
    dtype: torch.dtype, bad: float, signed: bool
) -> None:
    tensor = numbers(dtype)
    tensor[-1] = bad
    with pytest.raises(
        CheckpointError, match=r"third: expected finite numbers .* received NaN or infinity"
    ):
        magnitude_histogram(stream_of(tensor), signed=signed)
    extreme = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert kth_largest(lambda: [("w", extreme)], 1, signed=signed) == torch.finfo(dtype).max


@pytest.mark.parametrize("rank", [0, 4])
def test_refuses_ranks_that_do_not_exist(rank: int) -> None:
    with pytest.raises(InputError, match=f"rank: expected 1 to 3, .*received {rank}"):
        kth_largest(lambda: [("w", torch.ones(3))], rank)


def test_a_histogram_survives_being_remembered(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        tensor = numbers(dtype)
        memo = Memo(tmp_path)
        first = magnitude_histogram(stream_of(tensor), signed=True)
        for _ in range(2):  # computed, then read
            kept = Histogram.from_tensors(memo.get(["counts", str(dtype)], first.to_tensors))
            assert (kept.bits, kept.signed) == (first.bits, True)
            assert kth_largest(stream_of(tensor), 99, first=kept) == kth_largest(
                stream_of(tensor), 99, signed=True
            )


@pytest.mark.parametrize(
    ("density", "total", "kept"),
    [
        (0.07, 100, 7),
        (0.1, 30, 3),
        (0.2, 11, 3),
        (0.29, 100, 29),
        (1.0, 5, 5),
        (1e-9, 5, 1),
        (0.5, 1, 1),
    ],
)
def test_fractions_are_read_as_decimals(density: float, total: int, kept: int) -> None:
    assert count_kept(density, total) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.003, 0.2, 0.77, 0.99])
def test_trimming_keeps_the_largest_with_their_ties(dtype: torch.dtype, density: float) -> None:
    tensor = numbers(dtype)
    before = tensor.clone()
    wanted = count_kept(density, tensor.numel())
    kept = keep_largest(tensor, density)
    limit = np.sort(tensor.abs().double().numpy())[-wanted]
    expected = torch.where(tensor.abs().double() >= limit, tensor, torch.zeros_like(tensor))
    assert torch.equal(kept, expected)
    assert torch.equal(tensor, before)
    ties = int((tensor.abs().double() == limit).sum())
    assert limit == 0 or wanted <= int((kept != 0).sum()) <= wanted + ties - 1


def test_degenerate_tensors_are_trimmed_without_harm() -> None:
    assert keep_largest(torch.tensor([0.0, 3.0, 0.0]), 0.9).tolist() == [0.0, 3.0, 0.0]
    assert keep_largest(torch.tensor([2.0]), 0.01).tolist() == [2.0]
    assert keep_largest(torch.tensor(-2.0), 0.01).tolist() == -2.0
    assert keep_largest(torch.zeros(4, 1), 0.5).tolist() == [[0.0]] * 4
    assert keep_largest(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert keep_largest(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, 0.5).tolist() == [
        [0.0, 3.0],
        [0.0, 4.0],
    ]
    same = torch.tensor([1.0, 0.0])
    assert keep_largest(same, 1.0) is not same
    with pytest.raises(CheckpointError, match="weight w: expected finite"):
        keep_largest(torch.tensor([1.0, float("nan")]), 0.5, "weight w")


def test_a_threshold_between_two_fp32_numbers_is_not_rounded_down() -> None:
    below = np.float32(1)
    above = np.nextafter(np.float32(1), np.float32(2))
    tensor = torch.tensor([below, above])
    assert keep_from(tensor, 1 + 2.0**-30).tolist() == [0.0, float(above)]
    assert keep_from(tensor.double(), 1 + 2.0**-30).tolist() == [0.0, float(above)]
    assert keep_from(tensor, 1.0).tolist() == [1.0, float(above)]


def test_masks_of_exact_size_take_ties_by_position() -> None:
    tensor = numbers(torch.bfloat16).reshape(-1, 1)
    order = np.argsort(-tensor.abs().float().numpy().reshape(-1), kind="stable")
    for count in (0, 1, 5, 400, 2950, 3001):
        expected = torch.zeros(tensor.numel(), dtype=torch.bool)
        expected[torch.from_numpy(order[:count].copy())] = True
        assert torch.equal(largest_mask(tensor, count), expected.view(tensor.shape))
