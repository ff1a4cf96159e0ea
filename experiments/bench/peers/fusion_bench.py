"""FusionBench's fixed merges of models in memory, one coefficient for all experts."""

from __future__ import annotations

import sys
from typing import Any

from fusion_bench import BaseModelPool
from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm

from experiments.bench.peers.scoring import load, run_trials, setting_of


def main() -> None:
    """Run the trials; each has the mean of its point as the one coefficient."""
    setting = setting_of(sys.argv)
    experts = {f"expert {n}": load(folder) for n, folder in enumerate(setting["experts"])}
    pool = BaseModelPool({"_pretrained_": load(setting["base"]), **experts})

    def trial(point: list[float]) -> Any:
        scale = sum(point) / len(point)
        if setting["method"] == "ties":
            return TiesMergingAlgorithm(scale, threshold=20, remove_keys=[], merge_func="sum").run(
                pool
            )
        return TaskArithmeticAlgorithm(scaling_factor=scale).run(pool)

    run_trials(setting, trial)


if __name__ == "__main__":
    main()
