"""Made languages: words that follow each other at random, by a table of their own.

A language has 40 words of two or three syllables, and five successors for each of them. What the
next word will be is not certain, so that a model learns probabilities, and their exact loss is
known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

#: Languages that one source each knows, and one that the pivot knows alone.
LANGUAGES = ("hill", "shore")
HOME = "home"
WORDS = 40
FOLLOWERS = 5
#: Words of a text.
LENGTH = 14
#: Seed of words and tables, the same in every zoo.
TABLE = 37


@dataclass(frozen=True, eq=False)
class Language:
    """Words, and how they follow each other.

    Attributes:
        words: In the order of the table.
        follow: Probability of each word after each word ``(words, words)``.
    """

    words: tuple[str, ...]
    follow: npt.NDArray[np.float64]


@cache
def language(name: str) -> Language:
    """A language by its name."""
    index = (HOME, *LANGUAGES).index(name)
    generator = np.random.default_rng([TABLE, index])
    follow = np.zeros((WORDS, WORDS))
    for row in follow:
        followers = generator.choice(WORDS, FOLLOWERS, replace=False)
        row[followers] = generator.dirichlet(np.ones(FOLLOWERS))
    return Language(_words()[index * WORDS :][:WORDS], follow)


@cache
def _words() -> tuple[str, ...]:
    """Distinct words for all languages."""
    generator = np.random.default_rng(TABLE)
    drawn: dict[str, None] = {}
    while len(drawn) < WORDS * (1 + len(LANGUAGES)):
        consonants = generator.choice(list("bdfgklmnprstvz"), 3)
        vowels = generator.choice(list("aeiou"), 3)
        letters = "".join(one + two for one, two in zip(consonants, vowels, strict=True))
        drawn.setdefault(letters[: int(generator.integers(4, 7))])
    return tuple(drawn)


def texts(name: str, count: int, seed: Sequence[int]) -> list[str]:
    """Texts of a language."""
    spoken = language(name)
    generator = np.random.default_rng([*seed, (HOME, *LANGUAGES).index(name)])
    made = []
    for _ in range(count):
        at = [int(generator.integers(WORDS))]
        while len(at) < LENGTH:
            at.append(int(generator.choice(WORDS, p=spoken.follow[at[-1]])))
        made.append(" ".join(spoken.words[one] for one in at))
    return made


def exact_losses(name: str, found: Sequence[str]) -> list[float]:
    """What texts cost who knows the table, in nats per word."""
    spoken = language(name)
    place = {word: index for index, word in enumerate(spoken.words)}
    losses = []
    for text in found:
        at = [place[word] for word in text.split()]
        steps = [spoken.follow[one, two] for one, two in pairwise(at)]
        losses.append(float(np.log(WORDS) - np.log(steps).sum()) / LENGTH)
    return losses
