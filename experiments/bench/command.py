"""What the command line costs: user and system CPU seconds of whole processes, children included.

``check`` is that of a study of four experts with the headers of Llama 3 8B, whose weights are
holes; the first trial is that of the digits study in one process, if the zoo has the models
(``python -m experiments.zoo.digits``).
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.headers import LLAMA_8B, write_llama

REPEATS = 3
ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "experiments/0001-digits/study.yaml"


def cpu_of(*arguments: str) -> float:
    """CPU seconds of one process of this interpreter, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds(*arguments: str) -> float:
    """CPU seconds of one call of the command line; the median of a few, after one unmeasured."""
    times = [cpu_of("-m", "mergesearch", *arguments) for _ in range(REPEATS + 1)]
    return statistics.median(times[1:])


def until_first_trial(run: str) -> float:
    """CPU seconds of a run in one process, until it says what its first trial scored."""
    words = ["run", str(DIGITS), "--run", run, "--progress", "plain"]
    words += ["--set", "workers.backend=inline", "--set", "workers.count=1"]
    with subprocess.Popen(
        [sys.executable, "-m", "mergesearch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("anchor 1/"))
        spent = psutil.Process(process.pid).cpu_times()
        process.kill()
    return float(spent.user + spent.system)


def write_study(folder: Path) -> Path:
    """A study of base and four experts of 8B, by headers alone."""
    from datasets import Dataset, DatasetDict

    experts = {name: str(write_llama(folder / name, LLAMA_8B)) for name in "abcd"}
    splits = {
        split: Dataset.from_dict({"input_ids": [[1, 2, 3]], "id": [split]})
        for split in ("search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(folder / "data")
    study = {
        "name": "large",
        "base": str(write_llama(folder / "base", LLAMA_8B)),
        "experts": experts,
        "strategy": "cma_es",
        "evaluators": [{"kind": "language_model", "data": str(folder / "data"), "id": "id"}],
        "budget": {"trials": 300},
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(study))  # which is YAML too
    return file


def main() -> None:
    """Print what each verb costs."""
    figures = {
        "--help": cpu_seconds("--help"),
        "ls strategies": cpu_seconds("ls", "strategies"),
    }
    with tempfile.TemporaryDirectory() as place:
        figures["check, 8B"] = cpu_seconds("check", str(write_study(Path(place))))
        if (ROOT / "zoo/digits/base").is_dir():
            figures["check, digits"] = cpu_seconds("check", str(DIGITS))
            runs = [until_first_trial(f"{place}/run {index}") for index in range(REPEATS)]
            figures["run, digits, to the first trial"] = statistics.median(runs)
    print("command line (CPU seconds)")
    for name, seconds in figures.items():
        print(f"  mergesearch {name:<31} {seconds:.2f}")
    print(json.dumps({"command": {name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
