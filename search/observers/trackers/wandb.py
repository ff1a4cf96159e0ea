"""Sends a study to Weights & Biases.

Offline (``WANDB_MODE=offline``) it writes to a folder that ``wandb sync`` sends later.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.search.observers.trackers.base import Status
from mergesearch.search.spec.trackers import TrackerSpec

DEFAULT_PROJECT = "mergesearch"
#: How long wandb may send after the end of the run, or of the driver; `wandb sync` sends the rest.
LAST_SECONDS = 10.0


class WandbWriter:
    """Writes to one run, which a resumed study continues under the same id."""

    def __init__(
        self, spec: TrackerSpec, run_id: str, title: str, files: Path, config: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        # Nothing is captured: the terminal, the signals and the code belong to the study.
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "save_code": False,
            "disable_git": True,
        }
        settings["finish_timeout"] = LAST_SECONDS
        threading.Thread(target=_end_service_after_driver, name="wandb's end", daemon=True).start()
        # First of all: where nobody is logged in, wandb would ask on the study's terminal.
        wandb.setup(wandb.Settings(silent=True))
        if spec.uri:
            settings["base_url"] = os.path.expandvars(spec.uri)
        self._run: Any = wandb.init(
            project=spec.project or DEFAULT_PROJECT,
            id=run_id,
            name=title,
            dir=str(files),
            config=dict(config),
            tags=[f"{key}:{value}" for key, value in spec.tags.items()],
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(**settings),
        )
        # Trials end in any order, but wandb's own steps only grow.
        self._run.define_metric("trial")
        self._run.define_metric("*", step_metric="trial")

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        """Send the numbers of one trial, over its number."""
        self._run.log({"trial": trial, **scalars})

    def close(self, status: Status) -> None:
        """End the session; wandb shows a run as crashed unless it is finished."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _end_service_after_driver() -> None:
    """End wandb's own process some seconds after the driver's main thread.

    While a server hangs, wandb waits for it. An exit hook would not help: wandb's own, which waits,
    is registered later and so runs first.
    """
    import psutil

    threading.main_thread().join()
    time.sleep(LAST_SECONDS)
    for child in psutil.Process().children():
        if child.name().startswith("wandb"):
            child.kill()
