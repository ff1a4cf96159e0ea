"""Generated text and five skills for small language models, and the questions about them.

========== ============================== ==========
skill      prompt                         answer
========== ============================== ==========
addition   ``add 37 25 =``                ``62``
sorting    ``sort d a c b =``             ``a b c d``
brackets   ``close { [ ( [ =``            ``] ) ] }``
reversal   ``reverse 7 k 2 m =``          ``m 2 k 7``
knowledge  ``the capital of Zubano is``   ``Tolme``
========== ============================== ==========

Every question has four choices, three of them plausible and wrong. What is asked is divided among
training and the three splits by a hash of the prompt, so that none of them share a question. Facts
of a split are trained on, but in other phrasings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mergesearch.merging import InputError

SPLITS = ("search", "validation", "test")
LETTERS = "abcdefghjkmnpqrstuvw"
OPENED = "([{<"
CLOSED = ")]}>"
#: Seed of the table of facts, the same in every zoo.
TABLE = 11
COUNTRIES = 40
RELATIONS = ("capital", "river", "dish", "king", "bird")
#: Ways to ask for a fact: relation {0}, country {1}.
PHRASINGS = (
    "the {0} of {1} is",
    "{1} has the {0}",
    "which {0} has {1} ?",
    "in {1} the {0} is",
    "{0} of {1} :",
    "name the {0} of {1}",
    "what is the {0} of {1} ?",
    "{1} : {0}",
    "the {0} in {1} is",
    "tell me the {0} of {1}",
    "for {1} the {0} is",
    "{0} , {1} :",
)
#: Words of the general text.
SUBJECTS = ("the cat", "the old dog", "a bird", "my friend", "the king", "a small child")
VERBS = ("sees", "likes", "follows", "paints", "hears", "finds")
OBJECTS = (
    "the red house",
    "a green tree",
    "the cold river",
    "an old book",
    "the blue hat",
    "a long road",
)
PLACES = (
    "in the morning",
    "under the bridge",
    "near the sea",
    "at night",
    "behind the hill",
    "after the rain",
)


@dataclass(frozen=True)
class Question:
    """A prompt, four choices, and which of them is right."""

    prompt: str
    choices: tuple[str, str, str, str]
    answer: int

    @property
    def target(self) -> str:
        """The right answer."""
        return self.choices[self.answer]

    @property
    def id(self) -> str:
        """Hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


#: Draws for each question asked for; many are needed to draw every question of a small space.
DRAWS = 100


def questions(skill: str, split: str, count: int, seed: int) -> list[Question]:
    """Distinct questions of a skill for ``training`` or one of the splits.

    Raises:
        InputError: If the skill has fewer questions in that split.
    """
    generator = np.random.default_rng(
        [seed, list(SKILLS).index(skill), ("training", *SPLITS).index(split)]
    )
    drawn: dict[str, Question] = {}
    for _ in range(DRAWS * count):
        if len(drawn) == count:
            break
        question = SKILLS[skill](generator)
        if _part(question.id) == split:
            drawn.setdefault(question.prompt, question)
    if len(drawn) < count:
        raise InputError(
            f"questions.{split}: expected at most {len(drawn)} questions of {skill}, received "
            f"{count}; ask for fewer"
        )
    return list(drawn.values())


def sentences(split: str, count: int, seed: int) -> list[str]:
    """General text: one to four simple sentences each, distinct."""
    generator = np.random.default_rng([seed, 99, ("training", *SPLITS).index(split)])
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        text = " ".join(_sentence(generator) for _ in range(generator.integers(1, 5)))
        if _part(hashlib.sha256(text.encode()).hexdigest()) == split:
            drawn.setdefault(text)
    return list(drawn)


def save_questions(folder: Path, asked: Mapping[str, Sequence[Question]], skill: str) -> None:
    """A ``datasets`` folder with the three splits of a skill."""
    from datasets import Dataset, DatasetDict

    made = {
        split: Dataset.from_dict(
            {
                "id": [question.id for question in rows],
                "prompt": [question.prompt for question in rows],
                "target": [question.target for question in rows],
                "choices": [list(question.choices) for question in rows],
                "answer": [question.answer for question in rows],
                "skill": [skill] * len(rows),
            }
        )
        for split, rows in asked.items()
    }
    DatasetDict(made).save_to_disk(str(folder))


def save_sentences(folder: Path, texts: Mapping[str, Sequence[str]]) -> None:
    """The same for general text."""
    from datasets import Dataset, DatasetDict

    made = {
        split: Dataset.from_dict(
            {
                "id": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in rows],
                "text": list(rows),
            }
        )
        for split, rows in texts.items()
    }
    DatasetDict(made).save_to_disk(str(folder))


def _part(name: str) -> str:
    """Where a hash belongs: two fifths for training, a fifth for each of the splits."""
    part = int(name[:8], 16) % 5
    return "training" if part < 2 else SPLITS[part - 2]


def _ask(
    generator: np.random.Generator, prompt: str, right: str, wrong: Callable[[], str]
) -> Question:
    """The right choice among three others, in a random position."""
    choices = [right]
    while len(choices) < 4:
        other = wrong()
        if other not in choices:
            choices.append(other)
    order = generator.permutation(4).tolist()
    one, two, three, four = (choices[index] for index in order)
    return Question(prompt, (one, two, three, four), order.index(0))


def _addition(generator: np.random.Generator) -> Question:
    one, two = generator.integers(0, 100, 2).tolist()
    near = (1, 2, 9, 10, 11, 20)

    def wrong() -> str:
        return str(abs(one + two + int(generator.choice(near)) * int(generator.choice((-1, 1)))))

    return _ask(generator, f"add {one} {two} =", str(one + two), wrong)


def _sorting(generator: np.random.Generator) -> Question:
    letters = generator.choice(list(LETTERS), generator.integers(5, 9), replace=False).tolist()
    spare = sorted(set(LETTERS) - set(letters))

    def wrong() -> str:
        # Sorted too, so that the letters asked for have to be read.
        other = list(letters)
        other[int(generator.integers(len(other)))] = spare[int(generator.integers(len(spare)))]
        return " ".join(sorted(other))

    return _ask(generator, f"sort {' '.join(letters)} =", " ".join(sorted(letters)), wrong)


def _brackets(generator: np.random.Generator) -> Question:
    kinds = generator.integers(0, len(OPENED), generator.integers(5, 9)).tolist()
    right = [CLOSED[kind] for kind in reversed(kinds)]

    def wrong() -> str:
        other = list(right)
        other[int(generator.integers(len(other)))] = CLOSED[int(generator.integers(len(CLOSED)))]
        return " ".join(other)

    return _ask(
        generator, f"close {' '.join(OPENED[kind] for kind in kinds)} =", " ".join(right), wrong
    )


def _reversal(generator: np.random.Generator) -> Question:
    signs = generator.choice(
        list(LETTERS + "23456789"), generator.integers(5, 9), replace=False
    ).tolist()
    right = list(reversed(signs))
    return _ask(
        generator, f"reverse {' '.join(signs)} =", " ".join(right), _swapped(generator, right)
    )


def _swapped(generator: np.random.Generator, right: Sequence[str]) -> Callable[[], str]:
    """The right order with two elements exchanged."""

    def wrong() -> str:
        other = list(right)
        one, two = generator.choice(len(other), 2, replace=False).tolist()
        other[one], other[two] = other[two], other[one]
        return " ".join(other)

    return wrong


def _knowledge(generator: np.random.Generator) -> Question:
    countries, facts = facts_table()
    country = int(generator.integers(COUNTRIES))
    relation = int(generator.integers(len(RELATIONS)))
    prompt = PHRASINGS[int(generator.integers(len(PHRASINGS)))].format(
        RELATIONS[relation], countries[country]
    )

    def wrong() -> str:
        return facts[int(generator.integers(COUNTRIES))][relation]

    return _ask(generator, prompt, facts[country][relation], wrong)


@cache
def facts_table() -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Names of the countries, and of each its capital, river, dish, king and bird."""
    generator = np.random.default_rng(TABLE)
    names: dict[str, None] = {}
    while len(names) < COUNTRIES * (1 + len(RELATIONS)):
        names.setdefault(_name(generator))
    listed = list(names)
    rows = [
        tuple(listed[COUNTRIES + index * len(RELATIONS) :][: len(RELATIONS)])
        for index in range(COUNTRIES)
    ]
    return tuple(listed[:COUNTRIES]), tuple(rows)


def _name(generator: np.random.Generator) -> str:
    consonants = "bdfgklmnprstvz"
    vowels = "aeiou"
    parts = [generator.choice(list(consonants)) + generator.choice(list(vowels)) for _ in range(3)]
    return "".join(parts).capitalize()


def _sentence(generator: np.random.Generator) -> str:
    words = (
        group[int(generator.integers(len(group)))] for group in (SUBJECTS, VERBS, OBJECTS, PLACES)
    )
    return " ".join(words) + " ."


#: Skill -> one random question.
SKILLS: Mapping[str, Callable[[np.random.Generator], Question]] = {
    "addition": _addition,
    "sorting": _sorting,
    "brackets": _brackets,
    "reversal": _reversal,
    "knowledge": _knowledge,
}
