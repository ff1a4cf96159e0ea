"""JSON-able facts of a study beside its trials, kept as attributes of the Optuna study."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mergesearch.merging import RunFolderError
from mergesearch.merging.foreign.shown import shown
from mergesearch.search.record.attributes import study_value
from mergesearch.search.record.journal_lines import naming_the_line
from mergesearch.search.record.storage import Storage, StorageAccess, journal_of

#: Operators that a study with ``operator: auto`` goes on from.
OPERATORS_CHOSEN = "operators"

#: Whether the search has spent its budget.
SEARCHED = "searched"

#: What the study may spend, and since when, once that has changed.
ALLOWANCES = "allowances"

#: Functions of evaluators whose code changed while the study had results, one line each.
MENDED = "mended"

#: How many trials other runs gave with their scores, one line each, once all are recorded.
TAKEN = "taken scores"

#: Where experts come from, and what phases were expected to take.
LINEAGES = "lineages"
PREDICTED = "predicted seconds"

#: Cards that were set aside, and why, in all sessions.
SET_ASIDE = "set aside"


class StudyAttributes:
    """Attributes of one study in a storage.

    They are read once, when the first is asked for: a study has one driver, and whoever only reads
    has trials of one moment too.

    Args:
        storage: An Optuna storage.
        study_id: The study's id there.
        access: How the storage is read and written.
        before: Called before each write, to record the trials that it may be about.
    """

    def __init__(
        self,
        storage: Storage,
        study_id: int,
        access: StorageAccess,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._access = access
        self._before = before
        self._texts: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """What holds them, as errors name it."""
        return str(journal_of(self._storage) or "storage")

    def set(self, key: str, value: Any) -> None:
        """Record a JSON-able value."""
        text = json.dumps(value)
        self._before()
        self._access.write(
            lambda: self._storage.set_study_system_attr(self._study_id, _full_key(key), text)
        )
        self._known()[_full_key(key)] = text

    def get(self, key: str) -> Any:
        """A recorded value, or None.

        Raises:
            RunFolderError: If it is damaged.
        """
        return _value(self._storage, key, self._known().get(_full_key(key)))

    def _known(self) -> dict[str, Any]:
        if self._texts is None:
            self._texts = dict(
                self._access.read(lambda: self._storage.get_study_system_attrs(self._study_id))
            )
        return self._texts


def study_attr(storage: Storage, name: str, key: str) -> Any:
    """An attribute of the study called ``name``, or None, without reading its trials.

    Raises:
        RunFolderError: If the storage does not hold the study.
    """
    attributes = storage.get_study_system_attrs(study_id_of(storage, name))
    return _value(storage, key, attributes.get(_full_key(key)))


def study_id_of(storage: Storage, name: str) -> int:
    """Id of the study called ``name``.

    Raises:
        RunFolderError: If the storage does not hold the study.
    """
    try:
        return int(storage.get_study_id_from_name(name))
    except KeyError:
        raise RunFolderError(
            f"expected a study called {shown(name)} in the storage, found none; see `mergesearch "
            "run`"
        ) from None


def _value(storage: Storage, key: str, text: Any) -> Any:
    """A recorded value in its shape, or None.

    Raises:
        RunFolderError: If it is damaged.
    """
    if text is None:
        return None
    journal = journal_of(storage)
    return naming_the_line(journal, lambda: study_value(key, text, str(journal or "storage")))


def _full_key(key: str) -> str:
    return f"mergesearch:{key}"
