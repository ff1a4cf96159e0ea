"""What the command line costs: seconds of whole processes, children included.

CPU seconds are user and system time; wall seconds say little on a busy machine. ``check`` is that
of a study of four experts with the headers of Llama 3 8B, whose weights are holes, with token ids
and with texts as items. The first trial is that of the digits study, in one process and with two
Ray workers, if the zoo has the models (``python -m experiments.zoo.digits``); beside it stands what
the libraries of such a process take alone. Modules are loaded from bytecode, as after any first
run.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.headers import LLAMA_8B, write_llama

REPEATS = 3
ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "experiments/0001-digits/study.yaml"
SKILLS = ROOT / "zoo/skills/base"
INLINE = ("--set", "workers.backend=inline", "--set", "workers.count=1")
#: First words of lines of progress -> the phase that ends there.
PHASES = {
    "opening": "planned",
    "loading": "first weights asked for",
    "anchors": "loaded",
    "anchor 1/": "first trial",
}
#: The libraries that merge and evaluate an image model, imported as any program would.
LIBRARIES = "import torch, numba; from transformers.models.vit import ViTForImageClassification"


@dataclass(frozen=True)
class Cost:
    """Seconds of a process.

    Attributes:
        cpu: User and system time, of its children too.
        wall: Time that passed.
    """

    cpu: float
    wall: float


def cpu_of(*arguments: str) -> float:
    """CPU seconds of one process of this interpreter, its children included."""
    return cost_of(*arguments).cpu


def cost_of(*arguments: str) -> Cost:
    """What one process of this interpreter costs."""
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.perf_counter() - began)


def environment() -> dict[str, str]:
    """The environment of processes that keep the bytecode of what they import."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def median_cost(*arguments: str) -> Cost:
    """What one call costs; the median of a few, after one unmeasured."""
    return _median([cost_of(*arguments) for _ in range(REPEATS + 1)][1:])


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.cpu for cost in costs),
        statistics.median(cost.wall for cost in costs),
    )


def until_first_trial(run: str, *settings: str) -> dict[str, Cost]:
    """Phase of a run -> what it had cost at its end, until the first trial's score is said."""
    words = ["run", str(DIGITS), "--run", run, "--progress", "plain", *settings]
    reached: dict[str, Cost] = {}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "mergesearch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for start, phase in PHASES.items():
                if line.startswith(start) and phase not in reached:
                    reached[phase] = Cost(_cpu_so_far(process.pid), time.perf_counter() - began)
            if "first trial" in reached:
                break
        if settings == INLINE:
            process.kill()
        else:
            process.terminate()  # Ray's processes end with a driver that is asked to end
        process.communicate()
    return reached


def _cpu_so_far(pid: int) -> float:
    """CPU seconds of a process and of its children that live."""
    parent = psutil.Process(pid)
    spent = 0.0
    for process in (parent, *parent.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        spent += times.user + times.system
    return spent


def first_trial(place: Path, name: str, *settings: str) -> dict[str, Cost]:
    """Median costs until the ends of the phases that every run announces."""
    runs = [until_first_trial(f"{place}/{name} {index}", *settings) for index in range(REPEATS)]
    told = [phase for phase in PHASES.values() if all(phase in run for run in runs)]
    return {phase: _median([run[phase] for run in runs]) for phase in told}


def write_study(folder: Path, evaluator: Mapping[str, object] | None = None) -> Path:
    """A study of base and four experts of 8B, by headers alone.

    Args:
        folder: Where to.
        evaluator: Its section, without the items; by default the loss of token ids.
    """
    from datasets import Dataset, DatasetDict

    experts = {name: str(write_llama(folder / name, LLAMA_8B)) for name in "abcd"}
    splits = {
        split: Dataset.from_dict(
            {"input_ids": [[1, 2, 3]], "prompt": ["1 + 1 ="], "target": ["2"], "id": [split]}
        )
        for split in ("search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(folder / "data")
    items = {"data": str(folder / "data"), "id": "id"}
    study = {
        "name": "large",
        "base": str(write_llama(folder / "base", LLAMA_8B)),
        "experts": experts,
        "strategy": "cma_es",
        "evaluators": [{"kind": "language_model", **(evaluator or {}), **items}],
        "budget": {"trials": 300},
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(study))  # which is YAML too
    return file


def write_study_of_texts(folder: Path) -> Path:
    """The same with texts as items, and a tokenizer."""
    generation = {"kind": "generation", "tokenizer": str(SKILLS), "target": "target"}
    return write_study(folder, generation)


def main() -> None:
    """Print what each verb costs."""
    command = ("-m", "mergesearch")
    costs = {
        "--help": median_cost(*command, "--help"),
        "ls strategies": median_cost(*command, "ls", "strategies"),
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        costs["check, 8B"] = median_cost(*command, "check", str(write_study(place / "ids")))
        if SKILLS.is_dir():
            texts = write_study_of_texts(place / "texts")
            costs["check, 8B, texts"] = median_cost(*command, "check", str(texts))
        if (ROOT / "zoo/digits/base").is_dir():
            costs["check, digits"] = median_cost(*command, "check", str(DIGITS))
            costs["(libraries alone)"] = median_cost("-c", LIBRARIES)
            costs |= _of_runs(place)
    print(f"command line{'CPU':>42}{'wall seconds':>16}")
    for verb, cost in costs.items():
        print(f"  mergesearch {verb:<35}{cost.cpu:8.2f}{cost.wall:12.2f}")
    figures = {verb: [round(cost.cpu, 3), round(cost.wall, 3)] for verb, cost in costs.items()}
    print(json.dumps({"command": figures}))


def _of_runs(place: Path) -> dict[str, Cost]:
    """Costs of the digits study until the ends of its phases, in one process and in Ray's."""
    inline = first_trial(place, "inline", *INLINE)
    ray = first_trial(place, "ray")
    return {f"run, digits: {phase}": cost for phase, cost in inline.items()} | {
        f"run, digits, 2 Ray workers: {phase}": cost for phase, cost in ray.items()
    }


if __name__ == "__main__":
    main()
