"""``make bench-peers``: seconds to the first trial, trials per hour and memory of whole trials.

Every tool scores merges of the same checkpoints on the same tokens with the same function. Ours
goes first, as ``mergesearch run`` in one process; the others repeat its points, and their scores
are compared with its own. Only ratios are worth quoting. Files lie in the page cache. Memory is the
largest resident set, mapped files included.

Needs ``.venv-peers`` (``make peers``), prints one line without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.bench.merge import EXPERTS, PEERS, ROOT, write_models
from mergesearch.search.runs.opened import open_run

THREADS = 2
#: Trials of ours, and of the others, of which the first is beside the median.
TRIALS = 24
THEIRS = 4
#: Tool -> methods that it has.
TOOLS: Mapping[str, tuple[str, ...]] = {
    "mergekit_memory": ("task_arithmetic", "ties"),
    "mergekit_disk": ("task_arithmetic", "ties"),
    "plain_script": ("task_arithmetic",),
    "fusion_bench": ("task_arithmetic", "ties"),
}
#: Tools whose points are ours, so that scores must agree.
COMPARED = ("mergekit_memory", "mergekit_disk", "plain_script")
#: How many times our trials must be faster.
BARS = {"mergekit_memory": 10.0, "mergekit_disk": 50.0}


@dataclass(frozen=True)
class Row:
    """What one tool does with one method.

    Attributes:
        first: Seconds from the start of the process to the end of the first trial.
        trial: Seconds of a trial, median without the first.
        peak: Bytes of the largest resident set.
        ratio: Seconds of its trial over those of ours.
        apart: Largest difference of its scores from ours, over ours; None where points differ.
    """

    dtype: str
    method: str
    tool: str
    first: float
    trial: float
    peak: int
    ratio: float
    apart: float | None


def run_process(arguments: Sequence[str], log: Path) -> int:
    """Run a program to its end, its output into a file; its largest resident set in bytes."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {log.read_text()[-2000:]}")
    return 1024 * used.ru_maxrss


def ours(folder: Path, method: str) -> tuple[Row, list[list[float]], list[float]]:
    """Our row, with the points and scores of its trials."""
    run = folder / f"run {method}"
    study = folder / f"{method}.yaml"
    options = {"density": 0.2, "scope": "tensor"} if method == "ties" else {}
    data = {
        "name": method,
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in EXPERTS},
        "operator": {"name": method, **options},
        "space": {"granularity": "task", "bounds": [0.0, 1.0]},
        "strategy": "sobol",
        "anchors": "none",
        "allow_code": True,
        "evaluators": [
            {
                "kind": "python",
                "function": f"{ROOT}/experiments/bench/peers/scoring.py:score",
                "objectives": [{"name": "loss", "direction": "minimize"}],
            }
        ],
        "budget": {"trials": TRIALS},
        "workers": {"threads": THREADS},
    }
    study.write_text(json.dumps(data))
    began = time.time()
    command = [sys.executable, "-m", "mergesearch", "run", str(study), "--run", str(run)]
    peak = run_process(command, folder / "ours.log")
    records = [record for record in open_run(run).log.records if record.kind == "search"]
    ends = [record.finished for record in records]
    dtype = json.loads((folder / "base/config.json").read_text())["dtype"]
    trial = statistics.median(b - a for a, b in itertools.pairwise(ends))
    row = Row(dtype, method, "mergesearch", ends[0] - began, trial, peak, 1.0, None)
    points = [record.point.tolist() for record in records if record.point is not None]
    return row, points, [record.values["loss"] for record in records]


def theirs(
    folder: Path, own: Row, tool: str, points: Sequence[list[float]]
) -> tuple[Row, list[float]]:
    """A peer's row, and the scores of its trials."""
    setting = {
        "base": str(folder / "base"),
        "experts": [str(folder / name) for name in EXPERTS],
        "method": own.method,
        "points": points[:THEIRS],
        "dtype": own.dtype,
        "threads": THREADS,
        "out": str(folder / "merged"),
    }
    file = folder / "setting.json"
    file.write_text(json.dumps(setting))
    log = folder / f"{tool}.log"
    program = f"experiments.bench.peers.{tool}"
    peak = run_process([str(PEERS), "-m", program, str(file)], log)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"sec')]
    ends = [line["seconds"] for line in lines]
    trial = statistics.median(b - a for a, b in itertools.pairwise(ends))
    row = Row(own.dtype, own.method, tool, ends[0], trial, peak, trial / own.trial, None)
    return row, [line["loss"] for line in lines]


def measure(dtype: str) -> Iterator[Row]:
    """Rows of one dtype, one after the other."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as place:
        folder = Path(place)
        write_models(folder, dtype)
        for method in ("task_arithmetic", "ties"):
            own, points, losses = ours(folder, method)
            yield own
            for tool, methods in TOOLS.items():
                if method not in methods:
                    continue
                row, scores = theirs(folder, own, tool, points)
                pairs = list(zip(scores, losses, strict=False)) if tool in COMPARED else []
                apart = max((abs(a - b) / abs(b) for a, b in pairs), default=None)
                yield Row(**{**asdict(row), "apart": apart})


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    options = parser.parse_args()
    if not PEERS.exists():
        print("peers: no .venv-peers to compare with; `make peers` creates it")
        return
    print(f"peers: 124M parameters, {len(EXPERTS)} experts, {THREADS} threads")
    print(f"{'dtype':<9} {'method':<16} {'tool':<16} {'first s':>8} {'s a trial':>9} ", end="")
    print(f"{'an hour':>8} {'peak GB':>8} {'x ours':>7} apart", flush=True)
    rows = []
    for dtype in options.dtypes:
        for row in measure(dtype):
            rows.append(row)
            _print(row)
    print(json.dumps({"peers": [asdict(row) for row in rows]}))


def _print(row: Row) -> None:
    bar = BARS.get(row.tool)
    verdict = (
        "" if bar is None else f" (bar {bar:g}: {'reached' if row.ratio >= bar else 'MISSED'})"
    )
    apart = "" if row.apart is None else f"{row.apart:.1e}"
    print(
        f"{row.dtype:<9} {row.method:<16} {row.tool:<16} {row.first:>8.1f} {row.trial:>9.3f} "
        f"{3600 / row.trial:>8.0f} {row.peak / 1e9:>8.2f} {row.ratio:>7.1f} {apart}{verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()
