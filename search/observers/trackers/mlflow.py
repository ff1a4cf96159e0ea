"""Sends a study to MLflow: to a server, or to a SQLite file in the run folder."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging.foreign.paths import resolved
from mergesearch.search.observers.trackers.base import Status
from mergesearch.search.spec.trackers import TrackerSpec

#: Tag of an MLflow run that holds our id of it: MLflow chooses its own ids.
ID_TAG = "mergesearch.run"
DEFAULT_EXPERIMENT = "mergesearch"
#: Most parameters that MLflow takes at a time, and most characters of a value.
BATCH = 100
MAX_VALUE = 500
STATUSES: Mapping[Status, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class MlflowWriter:
    """Writes to one run of an experiment, which a resumed study finds by its tag."""

    def __init__(
        self, spec: TrackerSpec, run_id: str, title: str, files: Path, config: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the terminal is the study's
        uri = (
            os.path.expandvars(spec.uri)
            if spec.uri
            else f"sqlite:///{resolved(files / 'mlflow.db')}"
        )
        self._client: Any = MlflowClient(tracking_uri=uri)
        # By default MLflow writes artifacts below the current folder.
        artifacts = None if spec.uri else resolved(files / "mlflow").as_uri()
        experiment = self._experiment(spec.project or DEFAULT_EXPERIMENT, artifacts)
        earlier = self._client.search_runs(
            [experiment], f"tags.`{ID_TAG}` = '{run_id}'", max_results=1
        )
        if earlier:
            self._run: str = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {**spec.tags, ID_TAG: run_id}
        self._run = self._client.create_run(experiment, tags=tags, run_name=title).info.run_id
        self._send_parameters(config)

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        """Send the numbers of one trial; its number is the step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_key(key), value, now, trial) for key, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, status: Status) -> None:
        """End the MLflow run; a resumed study opens it again."""
        self._client.set_terminated(self._run, STATUSES[status])

    def _experiment(self, name: str, artifacts: str | None) -> str:
        known = self._client.get_experiment_by_name(name)
        return str(
            self._client.create_experiment(name, artifacts)
            if known is None
            else known.experiment_id
        )

    def _send_parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_key(key), str(value)[:MAX_VALUE]) for key, value in _leaves(config)]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self._run, params=params[start : start + BATCH])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys such as ``evaluators.0.kind`` and their values, without unset ones."""
    pairs = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if pairs is None:
        if value is not None:
            yield path, value
        return
    for key, inner in pairs:
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def _key(name: str) -> str:
    """A name in the characters that MLflow takes, cut to the 250 that it takes at most."""
    return re.sub(r"[^\w\-./ :]", "_", name)[:250]
