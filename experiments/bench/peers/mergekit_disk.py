"""mergekit's ``run_merge`` to a folder, which is loaded and scored: a serial loop over the disk."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from mergekit.merge import run_merge

from experiments.bench.peers.mergekit_settings import OPTIONS, configuration
from experiments.bench.peers.scoring import load, run_trials, setting_of


def main() -> None:
    """Run the trials."""
    setting = setting_of(sys.argv)
    out = Path(setting["out"])

    def trial(point: list[float]) -> Any:
        shutil.rmtree(out, ignore_errors=True)
        run_merge(configuration(setting, point), str(out), OPTIONS)
        return load(str(out))

    run_trials(setting, trial)


if __name__ == "__main__":
    main()
