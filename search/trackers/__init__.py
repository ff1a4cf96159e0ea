"""Experiment trackers that follow a study: TensorBoard, MLflow, Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from merging import InputError
from search.redact import redacted
from search.trackers.spec import TrackerSpec

if TYPE_CHECKING:
    from evaluators import Objective
    from search.record import TrialRecord
    from search.study import Event

__all__ = ["Status", "Tracker", "TrackerSpec", "Writer", "check_installed", "new_run_id", "open_tracker"]

#: How a session of the study ended.
Status = Literal["finished", "failed", "interrupted"]


class Writer(Protocol):
    """What one service needs; may raise anything, and may take its time."""

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        """Numbers of one trial."""

    def close(self, status: Status) -> None:
        """Send what is left, and say how the session ended."""


class Tracker:
    """Sends each trial to a writer: values, best so far, seconds by phase, counts of states.

    Args:
        id: What a resumed study needs to continue the same run of the service.
        writer: The service.
        objectives: Names and directions.
        records: Trials of earlier sessions; they count for the best values and the counts.
    """

    def __init__(
        self, id: str, writer: Writer, objectives: Sequence[Objective], records: Iterable[TrialRecord] = ()
    ) -> None:
        from search.metrics import BestSoFar

        past = list(records)
        self.id = id
        self._writer = writer
        self._best = BestSoFar(objectives, past)
        self._states = Counter[str](record.state for record in past if record.state != "running")

    def observe(self, event: Event) -> None:
        """Send a trial that ended; other events are not for trackers."""
        if event.kind == "trial" and event.record is not None:
            self._writer.write(self._scalars(event.record), event.record.number)

    def close(self, status: Status = "finished") -> None:
        """End the session."""
        self._writer.close(status)

    def _scalars(self, record: TrialRecord) -> dict[str, float]:
        self._best.add(record)
        self._states[record.state] += 1
        groups: dict[str, Mapping[str, float]] = {
            "value": record.values,
            "best": self._best.values,
            "seconds": record.seconds,
            "trials": self._states,
        }
        found = {f"{group}/{key}": float(v) for group, numbers in groups.items() for key, v in numbers.items()}
        return {key: value for key, value in found.items() if math.isfinite(value)}


def check_installed(spec: TrackerSpec) -> None:
    """Make sure that the tracker's package is there, without importing it.

    Raises:
        InputError: If it is not.
    """
    found = importlib.util.find_spec(spec.name)
    # A folder of that name beside the user (wandb makes one) is taken for a package without an origin.
    if found is None or found.origin is None:
        raise InputError(
            f"trackers: expected the package of {spec.name!r}, found none; run `pip install 'mergesearch[{spec.name}]'`"
        )


def new_run_id(study: str) -> str:
    """An id for a run of a tracker; chosen here, so that it can be recorded before the service is asked."""
    return f"{study[:80]}-{secrets.token_hex(4)}"


def open_tracker(
    spec: TrackerSpec,
    *,
    study: str,
    folder: Path,
    objectives: Sequence[Objective],
    resolved: Mapping[str, Any],
    run_id: str | None,
    records: Iterable[TrialRecord] = (),
) -> Tracker:
    """Open a run of the tracker, or the one with this id again.

    Args:
        spec: Which tracker, and its options.
        study: Name of the study.
        folder: The run folder; local files go to ``trackers`` in it.
        objectives: Names and directions.
        resolved: The resolved study; secrets in it are replaced before it is sent.
        run_id: Of an earlier session, or from :func:`new_run_id`; None makes one.
        records: Trials of earlier sessions.

    Raises:
        InputError: If the tracker's package is missing.
    """
    check_installed(spec)
    run_id = run_id or new_run_id(study)
    place = folder / "trackers" if spec.folder is None else Path(spec.folder)
    place.mkdir(parents=True, exist_ok=True)
    writer = _open_writer(spec, run_id, spec.run or study, place, redacted(resolved))
    return Tracker(run_id, writer, objectives, records)


def _open_writer(spec: TrackerSpec, run_id: str, title: str, place: Path, config: Mapping[str, Any]) -> Writer:
    if spec.name == "tensorboard":
        from search.trackers.tensorboard import TensorBoardWriter

        return TensorBoardWriter(run_id, title, place, config)
    if spec.name == "mlflow":
        from search.trackers.mlflow import MlflowWriter

        return MlflowWriter(spec, run_id, title, place, config)
    from search.trackers.wandb import WandbWriter

    return WandbWriter(spec, run_id, title, place, config)
