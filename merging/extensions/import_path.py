"""Where modules are imported from: never from where data may lie, unless a study names one.

A file such as ``optuna.py`` beside a run would otherwise take the place of the package of that
name. The current folder is on the import path of ``python -m`` and of ``python -c``, with which
multiprocessing begins its children, and Ray puts it on that of its workers. The command line takes
it away for itself (the package does so for ``python -m mergesearch``) and for every child. A module
that a study names, with ``allow_code: true``, may lie there still, behind all that is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: Python reads it at its start: if it has any value, the current folder is not on the import path.
VARIABLE = "PYTHONSAFEPATH"
#: The value that tells ours from one that the user has set.
OURS = "mergesearch"


@contextmanager
def protected_children() -> Iterator[None]:
    """Keep the current folder off the import path of all Python processes that are begun inside."""
    given = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = given or OURS
    try:
        yield
    finally:
        if not given:
            del os.environ[VARIABLE]


def environment_of_programs() -> dict[str, str]:
    """The environment for programs of the user's, which may import what lies beside them."""
    given = dict(os.environ)
    if given.get(VARIABLE) == OURS:
        del given[VARIABLE]
    return given


def admit_current_folder() -> None:
    """Let modules that a study names lie in the current folder, behind all that is installed."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def shared_with_workers(folders: Iterable[str]) -> list[str]:
    """Those of the folders from which this process itself imports."""
    ours = {os.path.abspath(each) for each in sys.path}
    return [each for each in folders if os.path.abspath(each) in ours]
