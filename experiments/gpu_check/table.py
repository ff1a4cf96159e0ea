"""All checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.gpu_check.check import Check, Tier

CHECKS: tuple[Check, ...] = (
    Check(
        "bits",
        "Do merges on the card have the CPU's bits, in every encoding, form and dtype?",
        "kernels",
        120,
        "bits",
    ),
    Check(
        "combine",
        "How near is a merge of 8B-shaped weights to a copy within the card's memory?",
        "kernels",
        60,
        "combine",
    ),
    Check(
        "sharing",
        "Do two and four processes merge from one arena on the card?",
        "kernels",
        60,
        "sharing",
    ),
    Check(
        "upload",
        "How fast does an arena reach the card?",
        "kernels",
        20,
        "upload",
    ),
    Check(
        "peak",
        "Is the planned peak of a trial the real one?",
        "full",
        120,
        "peak",
    ),
    Check(
        "out of memory",
        "Does a worker whose batch does not fit halve it and finish?",
        "full",
        40,
        "out_of_memory",
    ),
    Check(
        "two cards",
        "Is a model over two cards the one on one card?",
        "full",
        40,
        "two_cards",
    ),
    Check(
        "suite",
        "Do the tests marked gpu pass?",
        "full",
        90,
        "suite",
    ),
)

BY_NAME = {check.name: check for check in CHECKS}


def checks_of(tier: Tier) -> Iterator[Check]:
    """The checks that an environment of a tier can do."""
    return (check for check in CHECKS if tier == "full" or check.tier == "kernels")
