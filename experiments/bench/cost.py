"""What ``check --cost`` predicts beside what studies then take, in one process without Ray.

Seconds are those of the whole run in a process that has imported everything. The studies are those
of the zoos that are there (``python -m experiments.zoo.digits`` and others), with fewer trials.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.cost.study_cost import StudyCost, study_cost
from mergesearch.search.runs.driver import run_study

ROOT = Path(__file__).parents[2]
#: Study -> trials and other settings with which it is short.
STUDIES = {
    "0001-digits": ("budget.trials=60", "workers.count=null", "workers.backend=inline"),
    "0006-skills": ("budget.trials=30", "workers.backend=inline"),
    "0007-medsamix": ("budget.trials=30", "workers.backend=inline"),
}


def main() -> None:
    """Print a table: predicted and measured seconds of each study, and their ratio."""
    print("cost: `check --cost` beside the run that followed, one worker in one process\n")
    print(f"{'study':<12} {'trials':>6} {'s a trial':>9} {'predicted':>9} {'measured':>9} ratio")
    for name, settings in STUDIES.items():
        study = ROOT / "experiments" / name / "study.yaml"
        plan = plan_study(load_study(study, settings))
        if not Path(plan.template.base.path).is_dir():
            print(f"{name:<12} its models are not there")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            study_cost(plan, Path(scratch))  # imports, and compiles what is compiled once
            cost = study_cost(plan, Path(scratch))
            assert isinstance(cost, StudyCost), cost
            began = time.perf_counter()
            run_study(plan.spec, Path(scratch) / "run")
            measured = time.perf_counter() - began
        print(
            f"{name:<12} {cost.trials:>6} {cost.trial.trial:>9.3f} {cost.seconds:>9.1f} "
            f"{measured:>9.1f} {cost.seconds / measured:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
