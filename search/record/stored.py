"""What a storage holds of trials, and what it is asked to do with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

#: Name of a trial's state in Optuna, of those that trials of ours end in.
Ending = Literal["COMPLETE", "PRUNED", "FAIL"]


@dataclass(frozen=True, slots=True)
class StoredTrial:
    """A trial as it is read back.

    Attributes:
        id: The storage's own id.
        number: Position in the study, from 0.
        finished: Whether a result is recorded.
        values: One for each objective, where it is complete.
        attributes: Ours, each a JSON text.
    """

    id: int
    number: int
    finished: bool
    values: Sequence[float] | None
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AskedTrial:
    """A trial that is recorded as running.

    Attributes:
        number: Position in the study, from 0.
        text: What is recorded of it, as JSON.
        params: Named numbers that dashboards plot.
        bounds: Lowest and highest of ``params``.
        notes: What dashboards show as user attributes.
    """

    number: int
    text: str
    params: Mapping[str, float]
    bounds: tuple[float, float]
    notes: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class ToldTrial:
    """The result of a running trial.

    Attributes:
        number: Position in the study, from 0.
        attributes: Ours, in the order of writing.
        state: How it ended.
        values: One for each objective, where it is complete.
    """

    number: int
    attributes: Mapping[str, str | list[float]]
    state: Ending
    values: Sequence[float] | None


class TrialStore(Protocol):
    """Reads and writes the trials of one study."""

    @property
    def ids(self) -> Sequence[int]:
        """The storage's own ids of the trials that are recorded, by number."""

    @property
    def settled(self) -> bool:
        """Whether everything that was written is recorded."""

    def read(self) -> Iterator[StoredTrial]:
        """Every trial, by number."""

    def ask(self, trial: AskedTrial) -> None:
        """Record the next trial as running.

        Raises:
            StudyFailedError: If another driver has recorded a trial in its place.
        """

    def tell(self, trial: ToldTrial) -> None:
        """Record the result of a running trial.

        Raises:
            StudyFailedError: If another driver has recorded another result.
        """

    def set_asked(self, number: int, text: str) -> None:
        """Record again what a running trial was asked."""

    def batched_writes(self) -> AbstractContextManager[None]:
        """What is written inside is recorded together at the end; until then none of it is."""

    def flush(self) -> None:
        """Record what waits for the end of a batch, because what comes next builds on it."""

    def close(self) -> None:
        """Release what only a writer needs; reading goes on."""
