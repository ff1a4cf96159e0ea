"""Every exception that the project raises on purpose.

::

    MergesearchError
    ├── InputError            what the user gave is wrong (exit code 2)
    │   ├── CheckpointError   a checkpoint is missing, damaged, or does not fit its base
    │   ├── RecipeError       a recipe is malformed or does not fit its checkpoints
    │   └── RunFolderError    a run folder is missing, locked, unwritable, or holds another study
    ├── NonFiniteError        a merged tensor or a score holds NaN or infinity (an infeasible trial)
    └── StudyFailedError      the study cannot go on (exit code 1)
        └── ReplayError       the recorded trials do not follow from the study file and seed

Messages are one line: what was expected, what was received, what to do next. Whatever foreign text
is in one, its lines are printable and short.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mergesearch.merging.foreign.shown import cut, line_cut, printable

#: The most characters of a name and of a list of names in a message; ours are all shorter.
LONGEST_NAME = 60
LONGEST_LIST = 500


class MergesearchError(Exception):
    """Root of the tree; catching it catches everything the project raises on purpose."""

    def __str__(self) -> str:
        """The message in lines that are printable and have at most 700 characters each."""
        lines = printable(super().__str__(), keep="\n").split("\n")
        return "\n".join(map(line_cut, lines))


class InputError(MergesearchError):
    """Something that the user gave is wrong.

    The message names the file, the key, the value and what is allowed.
    """


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, of a refused format, or does not fit its base."""


class RecipeError(InputError):
    """A recipe is malformed or does not fit the checkpoints that it names."""


class RunFolderError(InputError):
    """A run folder is missing, unwritable, held by another driver, or holds a different study."""


class NonFiniteError(MergesearchError):
    """A merged tensor or a score is NaN or infinite; ``where`` names it."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} holds NaN or infinite values")
        self.where = where


class StudyFailedError(MergesearchError):
    """The study cannot go on, for example after too many failures in a row."""


class ReplayError(StudyFailedError):
    """Replaying the trial log did not reproduce a recorded point."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'cma_es'? known: ...``, the known names alone where none is close.

    Args:
        name: As received.
        known: All names that are accepted.
    """
    names = sorted(map(printable, known))  # those of experts and columns are foreign text
    close = [each for each in names if len(name) > 2 and each.startswith(name)]
    if len(name) < 100:  # the comparison takes as long as the name is long, squared
        close = close or difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {cut(close[0], LONGEST_NAME)!r}? " if close else ""
    listed = ", ".join(cut(each, LONGEST_NAME) for each in names)
    return f"{hint}known: {cut(listed, LONGEST_LIST)}"
