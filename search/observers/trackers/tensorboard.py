"""Writes a study for TensorBoard: a folder with an event file for each session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.search.observers.trackers.base import Status

#: Delay with which TensorBoard sees a running study.
FLUSH_SECONDS = 10


class TensorBoardWriter:
    """Writes to ``tensorboard/RUN_ID`` in the folder for local files; the study once, as text."""

    def __init__(self, run_id: str, title: str, files: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = files / "tensorboard" / run_id
        fresh = not any(folder.glob("events.out.*"))
        self._events: Any = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        if fresh:
            text = json.dumps({"run": title, **config}, indent=2)
            self._events.add_text(
                "study", "".join(f"    {line}\n" for line in text.splitlines()), 0
            )

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        """Send the numbers of one trial; its number is the step."""
        for key, value in scalars.items():
            self._events.add_scalar(key, value, trial)

    def close(self, status: Status) -> None:
        """Write what is left."""
        self._events.add_text("status", status)
        self._events.close()
