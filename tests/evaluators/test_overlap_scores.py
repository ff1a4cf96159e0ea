"""Overlap scores, cross-entropy and object logits of masks that are made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators.images.segmentation import (
    object_logits,
    overlap_scores,
    pixel_cross_entropy,
    resized,
)
from tests.evaluators.masks import plain_dice, plain_iou


def scores_of(
    answer: Any, mask: Any, *, background: int | None = 0, ignored: int | None = None
) -> tuple[float, float]:
    """Dice and IoU of one hand-made mask."""
    answers, masks = (torch.tensor(array, dtype=torch.int64)[None] for array in (answer, mask))
    results = overlap_scores(
        answers, masks, masks != (-1 if ignored is None else ignored), 4, background
    )
    return float(results["dice"][0]), float(results["iou"][0])


class TestMasksByHand:
    @pytest.mark.parametrize(
        ("answer", "mask", "options", "dice", "iou"),
        [
            ([[1, 1, 0, 0]], [[0, 1, 1, 0]], {}, 1 / 2, 1 / 3),
            ([[1, 0, 0, 0]], [[1, 0, 0, 0]], {}, 1.0, 1.0),
            ([[0, 0, 0, 0]], [[0, 0, 0, 0]], {}, 1.0, 1.0),  # nothing to find, nothing found
            ([[0, 0, 0, 1]], [[0, 0, 0, 0]], {}, 0.0, 0.0),
            ([[0, 0, 0, 0]], [[0, 1, 1, 0]], {}, 0.0, 0.0),
            ([[1, 2, 2, 0]], [[1, 2, 0, 0]], {}, (1 + 2 / 3) / 2, (1 + 1 / 2) / 2),
            (
                [[1, 3, 0, 0]],
                [[1, 2, 0, 0]],
                {},
                1 / 3,
                1 / 3,
            ),  # a class that only the answer has counts
            (
                [[0, 1, 1, 1]],
                [[0, 0, 1, 1]],
                {"background": None},
                (2 / 3 + 4 / 5) / 2,
                (1 / 2 + 2 / 3) / 2,
            ),
            ([[0, 1, 1, 1]], [[0, 0, 1, 1]], {"background": 1}, 2 / 3, 1 / 2),
            (
                [[1, 1, 1, 0]],
                [[3, 1, 0, 0]],
                {"ignored": 3},
                2 / 3,
                1 / 2,
            ),  # the first pixel counts nowhere
            ([[1, 1, 1, 1]], [[3, 3, 3, 3]], {"ignored": 3}, 1.0, 1.0),
        ],
    )
    def test_dice_and_iou(
        self, answer: Any, mask: Any, options: Any, dice: float, iou: float
    ) -> None:
        assert scores_of(answer, mask, **options) == (
            pytest.approx(dice, abs=1e-12),
            pytest.approx(iou, abs=1e-12),
        )

    @given(
        seed=st.integers(0, 999),
        present=st.integers(1, 4),
        background=st.sampled_from([None, 0, 2]),
    )
    @settings(max_examples=40, deadline=None)
    def test_agree_with_the_definition(
        self, seed: int, present: int, background: int | None
    ) -> None:
        answer, mask = np.random.default_rng(seed).integers(0, present, (2, 5, 7))
        classes = [c for c in range(4) if c != background]
        expected = plain_dice(answer, mask, classes), plain_iou(answer, mask, classes)
        dice, iou = scores_of(answer, mask, background=background)
        assert (dice, iou) == (
            pytest.approx(expected[0], abs=1e-12),
            pytest.approx(expected[1], abs=1e-12),
        )
        assert scores_of(mask, answer, background=background) == (dice, iou)
        assert 0 <= iou <= dice <= 1

    def test_cross_entropy_leaves_out_what_is_ignored(self) -> None:
        logits = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 1.0, -5.0]]]])
        masks = torch.tensor([[[0, 1, 9]]])
        counted = torch.tensor([[[True, True, False]]])
        expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
        assert float(pixel_cross_entropy(logits, masks, counted)) == pytest.approx(
            expected, abs=1e-6
        )
        assert float(pixel_cross_entropy(logits, masks, torch.zeros_like(counted))) == 0.0

    def test_logits_are_enlarged_bilinearly(self) -> None:
        small = torch.tensor([[[[0.0, 4.0]]]])
        large = resized(small, torch.zeros(1, 1, 4))
        np.testing.assert_allclose(large.numpy()[0, 0, 0], [0, 1, 3, 4])
        assert resized(small, torch.zeros(1, 1, 2)) is small

    def test_the_mask_of_the_best_expected_iou_is_taken_and_prompts_are_joined(self) -> None:
        class Output:
            pred_masks = torch.tensor(
                [[[[[-1.0, -1]], [[5, -1]]], [[[-2, 3]], [[9, 9]]]]]
            )  # two prompts, two masks
            iou_scores = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])

        np.testing.assert_array_equal(object_logits(Output)[0].numpy(), [[[0, 0]], [[5, 3]]])
