"""Which pairs a model is judged by, and how they are shown."""

from __future__ import annotations

from mergesearch.evaluators.preference.pairing import (
    Slot,
    digest,
    pair_digest,
    plan_slots,
    sides,
    strongest,
)
from mergesearch.evaluators.preference.strengths import Strength

PROMPTS = ["p0", "p1", "p2", "p3", "p4", "p5"]


def test_a_model_meets_the_base_and_the_strongest_in_turn() -> None:
    slots = plan_slots(PROMPTS, "base", ["best", "second"], 6)
    assert [slot.opponent for slot in slots] == ["base", "best", "base", "second", "base", "best"]
    assert [slot.prompt for slot in slots] == PROMPTS


def test_the_first_model_meets_the_base_alone() -> None:
    assert plan_slots(PROMPTS, "base", [], 2) == (Slot("p0", "base"), Slot("p1", "base"))


def test_the_strongest_come_first_and_of_equals_the_latest() -> None:
    order = ["base", "a", "b", "c", "d"]
    known = {"a": Strength(1.0, 0.5), "b": Strength(-1.0, 0.5)}
    assert strongest(order, known, "base", 2) == ["a", "d"]
    assert strongest(order, {}, "base", 9) == ["d", "c", "b", "a"]


def test_a_pair_is_the_same_in_both_orders_and_for_no_other_prompt() -> None:
    pair = pair_digest("preference", "p0", "x", "y")
    assert pair == pair_digest("preference", "p0", "y", "x")
    others = (
        ("preference", "p1", "x", "y"),
        ("style", "p0", "x", "y"),
        ("preference", "p0", "x", "z"),
    )
    assert pair not in {pair_digest(*other) for other in others}
    assert digest(b"a", "text") != digest(b"a", "png")


def test_sides_are_drawn_by_the_seed_and_are_even() -> None:
    pairs = [pair_digest("preference", f"p{n}", "x", "y") for n in range(400)]
    drawn = [sides(pair, "x", "y", 7) for pair in pairs]
    assert drawn == [sides(pair, "y", "x", 7) for pair in pairs]
    assert drawn != [sides(pair, "x", "y", 8) for pair in pairs]
    left = sum(first == "x" for first, _ in drawn)
    assert 150 < left < 250
