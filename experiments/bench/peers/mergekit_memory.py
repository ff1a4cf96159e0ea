"""mergekit's plan executed into a resident model, as mergekit-evolve does it.

``MergePlanner.plan_in_memory`` wraps every tensor in a task that pydantic 2.14 refuses to make, so
that the tensors' own tasks are executed and cast here, which is what the wrapper does.
"""

from __future__ import annotations

import sys
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.graph import Executor
from mergekit.plan import MergePlanner

from experiments.bench.peers.mergekit_settings import OPTIONS, configuration
from experiments.bench.peers.scoring import load, run_trials, setting_of


def main() -> None:
    """Run the trials."""
    setting = setting_of(sys.argv)
    model = load(setting["base"])
    parameters = dict(model.named_parameters())
    architecture = arch_info_for_config(model.config)

    def trial(point: list[float]) -> Any:
        planner = MergePlanner(configuration(setting, point), architecture, OPTIONS, model.config)
        planner._plan()
        names = {task: weight.name for weight, task in planner._tensors}
        executor = Executor(list(names), math_device="cpu", storage_device="cpu")
        for task, value in executor.run(quiet=True):
            parameters[names[task]].data.copy_(value)
        return model

    run_trials(setting, trial)


if __name__ == "__main__":
    main()
