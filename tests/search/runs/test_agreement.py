"""Scores agree to the bit on one device, and within the stated tolerance between two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators import Measurement
from mergesearch.search.record.trial_record import Score
from mergesearch.search.runs.agreement import Agreement, compare_scores, relative_tolerance
from mergesearch.search.workers.devices import Device, current_device, device_from

CPU = Device(dtype="float32", attention="sdpa")
CARD = Device("NVIDIA H200", 1, "9.0", "570.86.15", "12.8", False, False, "sdpa", "float32")
ITEMS = 500


def answers(flips: int = 0, *, one_way: bool = False) -> np.ndarray:
    """Right and wrong answers in turn, the first so many of them changed."""
    scores = np.arange(ITEMS) % 2.0
    changed = np.arange(flips) * (2 if one_way else 1)
    scores[changed] = 1 - scores[changed]
    return scores


def compared(
    old: np.ndarray, new: np.ndarray, *devices: Device, here: Device = CPU, weighted: bool = True
) -> Agreement:
    weights = {"acc": np.full(len(new), 1 / len(new))} if weighted else {}
    recorded = Score({"acc": float(old.mean())}, {"acc": 0.02}, {"acc": old})
    again = Measurement({"acc": float(new.mean())}, items={"acc": new}, weights=weights)
    return compare_scores(recorded, again, devices, here)


@pytest.mark.parametrize("devices", [(), (CPU,), (replace(CPU, dtype="bfloat16"),)])
def test_known_and_unknown_processors_are_exact(devices: tuple[Device, ...]) -> None:
    assert compared(answers(), answers(), *devices) == Agreement(True, True)
    assert compared(answers(), answers() + 1e-12, *devices) == Agreement(False, False)


def test_the_same_card_is_exact_whatever_the_number_of_cards() -> None:
    assert not compared(answers(), answers(3), CARD, here=replace(CARD, count=8)).agrees


@pytest.mark.parametrize(
    ("name", "value"), [("driver", "575.1"), ("tf32", True), ("attention", "eager")]
)
def test_another_setting_of_the_same_card_is_named(name: str, value: object) -> None:
    agreement = compared(answers(), answers(3), CARD, here=replace(CARD, **{name: value}))
    assert agreement.agrees
    assert f"with {name} {getattr(CARD, name)} -> {value}: acc moved" in agreement.reason


def test_what_moved_and_where_is_said() -> None:
    assert compared(answers(), answers(3), CARD) == Agreement(
        False,
        True,
        "recorded on NVIDIA H200 (driver 570.86.15, CUDA 12.8), scored again on the CPU: acc moved "
        "by 0.002, at most 0.00743 is allowed, 3 of 500 items differ, at most 10 may",
    )


@pytest.mark.parametrize(
    ("flips", "one_way", "agrees"),
    [(10, False, True), (11, False, False), (3, True, True), (9, True, False)],
)
def test_flips_are_few_and_balanced(flips: int, one_way: bool, agrees: bool) -> None:
    old = answers() * 0.02 if one_way else answers()  # a value so small that 1e-3 of it is nothing
    new = answers(flips, one_way=one_way) * 0.02 if one_way else answers(flips)
    assert compared(old, new, CARD).agrees is agrees


def test_rounding_of_every_item_is_no_flip() -> None:
    old = np.random.default_rng(0).normal(-50, 20, ITEMS)
    assert compared(old, old * (1 + 5e-4), CARD).agrees
    assert not compared(old, old * (1 + 5e-3), CARD).agrees
    narrow = replace(CARD, dtype="bfloat16")
    assert compared(old, old * (1 + 5e-3), narrow, here=replace(CPU, dtype="bfloat16")).agrees


@pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        (CPU, 1e-3),
        (CARD, 1e-3),
        (replace(CARD, tf32=True), 2.0**-8),
        (replace(CARD, dtype="float16"), 2.0**-8),
        (replace(CARD, dtype="bfloat16", tf32=True), 2.0**-5),
        (Device(), 1e-3),
    ],
)
def test_the_dtype_that_rounds_most_sets_the_tolerance(device: Device, tolerance: float) -> None:
    assert relative_tolerance(device) == tolerance


def test_without_weights_the_standard_error_bounds_the_value() -> None:
    assert compared(answers(), answers(4), CARD, weighted=False).agrees
    old = Score({"f": 1.0}, {"f": 0.1})
    for value, agrees in ((1.04, True), (1.05, False)):
        assert compare_scores(old, Measurement({"f": value}), [CARD], CPU).agrees is agrees


def test_scores_that_are_missing_do_not_agree() -> None:
    gap = answers()
    gap[3] = np.nan
    assert compared(gap, gap.copy(), CARD).agrees is False  # the mean is no number
    assert not compared(answers(), answers()[:99], CARD).agrees
    assert not compare_scores(Score({"f": 1.0}, {}), Measurement({}), [CARD], CPU).agrees
    more = Measurement({"f": 1.0, "g": 2.0})
    assert not compare_scores(Score({"f": 1.0}, {}), more, [CARD], CPU).agrees


def test_a_device_survives_its_record() -> None:
    assert device_from(CARD.to_dict() | {"key of a later version": 1}) == CARD


def test_the_processor_has_settings_but_no_card() -> None:
    import torch

    device = current_device(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    assert device == Device(dtype="bfloat16")
    assert current_device() == Device()
    assert str(device) == "the CPU"
