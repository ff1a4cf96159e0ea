"""Refuses merges of weights that have no common origin, and says what to do about them."""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.messages import listed
from mergesearch.merging.lineage.relation import Kind, Lineage
from mergesearch.merging.lineage.verdict import DISTANT_BELOW, UNRELATED_BELOW

#: Kind -> what was expected, what it is, and what to do instead.
_EXPLAINED: dict[Kind, tuple[str, str, str]] = {
    "unrelated": (
        f"weights trained from the base, with a cosine of {UNRELATED_BELOW} or more",
        "weights of another origin, whose averages with the base's are noise",
        "choose experts of this base",
    ),
    "permuted": (
        "hidden units in the base's order",
        "a permuted twin, which may work alike but cannot be merged element by element",
        "bring its units into the base's order by weight matching (Git Re-Basin), see align",
    ),
    "locked": (
        "heads near the base's",
        "a model locked against merging",
        "set unlock: true",
    ),
    "rescaled": (
        "weights on the base's scale",
        "rescaled weights, which may work alike but cannot be averaged",
        "divide the factors out of them",
    ),
}


def check_lineages(
    lineages: Sequence[Lineage], allowed: str | bool | None, override: str
) -> list[str]:
    """Refuse experts that do not come from the base, or say that they were allowed.

    Args:
        lineages: Of all experts.
        allowed: The user's reason to merge them all the same, or True for no reason in particular.
        override: How the user says so, for the message.

    Returns:
        Warnings, one line each.

    Raises:
        CheckpointError: In one line, for the first of them, unless they are allowed.
    """
    refused = [lineage for lineage in lineages if lineage.refused]
    if refused and not allowed:
        others = f" (as {len(refused) - 1} more of the experts)" if len(refused) > 1 else ""
        raise CheckpointError(f"{refusal(refused[0])}{others}, or {override}")
    reason = f": {allowed}" if isinstance(allowed, str) else ""
    warnings = [f"{found(lineage)}; merged all the same, as asked{reason}" for lineage in refused]
    distant = [found(lineage) for lineage in lineages if lineage.kind == "distant"]
    far = [
        f"expert {lineage.expert[0]!r}: unrelated to the base's, trained anew?: "
        f"{listed(lineage.apart)}"
        for lineage in lineages
        if lineage.apart and not lineage.refused
    ]
    broken = [
        f"expert {lineage.expert[0]!r}: expected finite weights, received NaN or infinity in "
        f"{listed(lineage.broken)}; merges with it fail: restore the checkpoint"
        for lineage in lineages
        if lineage.broken
    ]
    return [*warnings, *distant, *far, *broken]


def refusal(lineage: Lineage) -> str:
    """What was expected, what was received, and what to do."""
    name, path = lineage.expert
    expected, meaning, remedy = _EXPLAINED[lineage.kind]
    if lineage.recovered is not None:
        remedy += f" ({lineage.recovered:.0%} of distance recovered)"
    return (
        f"expert {name!r} ({path}): expected {expected} ({lineage.base[1]}), received "
        f"{lineage.finding}: {meaning}; {remedy}"
    )


def found(lineage: Lineage) -> str:
    """A warning about an expert."""
    limit = f", below {DISTANT_BELOW}" if lineage.kind == "distant" else ""
    return f"expert {lineage.expert[0]!r}: {lineage.kind}, with {lineage.finding}{limit}"
