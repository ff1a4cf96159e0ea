"""Which pairs of outputs a judge is shown, and on which side each of them is.

A model is compared on a fixed number of prompts, the same ones for all models: with the base on
every other prompt, which keeps the scale, and on those between with the strongest models so far,
which tells good ones apart that are all preferred to the base.

A pair is known by the prompt and the two outputs, not by the models that wrote them. So where two
models write the same, a choice counts for both, and nobody is asked twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mergesearch.evaluators.preference.strengths import Strength

Choice = Literal["left", "right", "tie"]
#: How many of the strongest models so far a new one is compared with, beside the base.
RIVALS = 2


@dataclass(frozen=True)
class Slot:
    """A comparison that a model needs: on a prompt, with an opponent.

    Attributes:
        prompt: Digest of the prompt.
        opponent: The other model.
    """

    prompt: str
    opponent: str


def digest(content: bytes, kind: str = "text") -> str:
    """Digest of an output, or of a prompt."""
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()[:32]


def pair_digest(objective: str, prompt: str, one: str, other: str) -> str:
    """Digest of a pair of outputs for a prompt, all as digests; alike in both orders."""
    text = "\0".join([objective, prompt, *sorted((one, other))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def strongest(
    order: Sequence[str], strengths: Mapping[str, Strength], base: str, count: int = RIVALS
) -> list[str]:
    """The strongest models, best first; of equals the latest, and a model without choices has 0.

    Args:
        order: The models that have outputs, as they came.
        strengths: Those that have choices.
        base: Left out.
        count: How many at most.
    """
    unknown = Strength(0.0, 0.0)
    ranked = sorted(
        ((strengths.get(name, unknown).value, index) for index, name in enumerate(order)),
        reverse=True,
    )
    return [order[index] for _, index in ranked if order[index] != base][:count]


def plan_slots(
    prompts: Sequence[str], base: str, rivals: Sequence[str], choices: int
) -> tuple[Slot, ...]:
    """The comparisons of a new model, one on each of the first prompts.

    Args:
        prompts: Digests of the prompts, in their fixed order.
        base: The base.
        rivals: Other models, the best first.
        choices: How many.
    """
    opponents = [name for rival in rivals for name in (base, rival)] or [base]
    return tuple(
        Slot(prompt, opponents[number % len(opponents)])
        for number, prompt in enumerate(prompts[:choices])
    )


def sides(pair: str, one: str, other: str, seed: int) -> tuple[str, str]:
    """Which output is shown on the left and which on the right, drawn by the seed for each pair."""
    first, second = sorted((one, other))
    rng = np.random.default_rng([seed, int(pair, 16)])
    return (first, second) if rng.random() < 0.5 else (second, first)
