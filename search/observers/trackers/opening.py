"""Opens the trackers that a study names, and the runs of earlier sessions again."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.observers.trackers.base import Tracker, Writer
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.redact import redacted
from mergesearch.search.spec.trackers import TrackerSpec


def check_installed(spec: TrackerSpec) -> None:
    """Check that the tracker's package is installed, without importing it.

    Raises:
        InputError: If it is not.
    """
    package = importlib.util.find_spec(spec.name)
    # A folder of that name in the current one (wandb makes one) is a package without an origin.
    if package is None or package.origin is None:
        raise InputError(
            f"trackers: expected the package of {spec.name!r}, found none; run `pip install "
            f"'mergesearch[{spec.name}]'`"
        )


def new_run_id(study: str) -> str:
    """An id for a run of a tracker, chosen here to be recorded before the service is asked."""
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
        run_id: Id of an earlier session or from :func:`new_run_id`; None makes one.
        records: Trials of earlier sessions.

    Raises:
        InputError: If the tracker's package is missing.
    """
    check_installed(spec)
    run_id = run_id or new_run_id(study)
    files = folder / "trackers" if spec.folder is None else Path(spec.folder)
    files.mkdir(parents=True, exist_ok=True)
    writer = _open_writer(spec, run_id, spec.run or study, files, redacted(resolved))
    return Tracker(run_id, writer, objectives, records)


def _open_writer(
    spec: TrackerSpec, run_id: str, title: str, files: Path, config: Mapping[str, Any]
) -> Writer:
    if spec.name == "tensorboard":
        from mergesearch.search.observers.trackers.tensorboard import TensorBoardWriter

        return TensorBoardWriter(run_id, title, files, config)
    if spec.name == "mlflow":
        from mergesearch.search.observers.trackers.mlflow import MlflowWriter

        return MlflowWriter(spec, run_id, title, files, config)
    from mergesearch.search.observers.trackers.wandb import WandbWriter

    return WandbWriter(spec, run_id, title, files, config)
