"""``make bench-peers``: what whole trials of each tool take, and how much memory.

Every tool scores merges of the same checkpoints on the same tokens with the same function. Ours
goes first, as ``mergesearch run`` in one process; the others repeat its points, and their scores
are compared with its own. Only ratios are worth quoting. Files lie in the page cache.

A trial is what lies between the ends of two evaluations, in seconds of the clock and in CPU seconds
of the process. Ratios are of CPU seconds, which a busy machine changes least. All tools evaluate
alike, so that a tool whose merges took no time at all would still be no more than ``bound`` times
as fast as another one: the other one's trial over our evaluation. ``merge`` compares what is left
of trials without their evaluations.

Memory is given as the process' own and as pages of mapped files (:mod:`.watching`). Bytes read are
those of calls; what is read by mapping is counted as mapped.

Needs ``.venv-peers`` (``make peers``), prints one line without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.bench.merge import PEERS, ROOT
from experiments.bench.peers.models import EXPERTS, SIZES, parameters, write_models
from experiments.bench.peers.watching import Use, run_watched
from mergesearch.search.runs.opened import open_run

#: Trials of ours, and of the others, of which the first is beside the median.
TRIALS = 24
THEIRS = 4
METHODS = ("task_arithmetic", "ties")
#: Tool -> methods that it has.
TOOLS: Mapping[str, tuple[str, ...]] = {
    "mergekit_memory": METHODS,
    "mergekit_disk": METHODS,
    "plain_script": ("task_arithmetic",),
    "fusion_bench": METHODS,
}
#: Tools whose points are ours, so that scores must agree.
COMPARED = ("mergekit_memory", "mergekit_disk", "plain_script")
#: How many times our trials must be faster.
BARS = {"mergekit_memory": 10.0, "mergekit_disk": 50.0}

#: Columns of the table; sizes are in GB.
HEADS = (
    *("first s", "s/trial", "CPU s", "eval s", "x ours", "merge x", "bound x"),
    *("own GB", "mapped", "peak", "read", "written"),
)


@dataclass(frozen=True)
class Setting:
    """What all tools of a run have in common.

    Attributes:
        folder: Where checkpoints and results are.
        dtype: Of the checkpoints.
        method: Of the merges.
        threads: For every tool.
    """

    folder: Path
    dtype: str
    method: str
    threads: int


@dataclass(frozen=True)
class Row:
    """What one tool does with one method.

    Attributes:
        first: Seconds from the start of the process to the end of the first trial.
        trial: Seconds of a trial, median without the first.
        cpu: CPU seconds of a trial, median without the first.
        evaluate: CPU seconds of its evaluation alone, median.
        use: What the process used.
        ratio: CPU seconds of its trial over those of ours.
        merge: The same without the evaluations.
        bound: CPU seconds of its trial over those of our evaluation.
        apart: Largest difference of its scores from ours, over ours; None where points differ.
    """

    dtype: str
    method: str
    tool: str
    first: float
    trial: float
    cpu: float
    evaluate: float
    use: Use
    ratio: float = 1.0
    merge: float = 1.0
    bound: float = 1.0
    apart: float | None = None


@dataclass(frozen=True)
class Trials:
    """A tool's row, and the scores of its trials in order."""

    row: Row
    losses: Sequence[float]


def run_tool(setting: Setting, tool: str, command: Sequence[str], count: int) -> Trials:
    """Run a program that scores ``count`` merges first, and read what each of them took."""
    scores = setting.folder / "scores.jsonl"
    scores.unlink(missing_ok=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setting.threads))
    paths = {"PYTHONPATH": str(ROOT), "BENCH_SCORES": str(scores)}
    environment = {**os.environ, **threads, **paths, "HF_HUB_OFFLINE": "1"}
    use = run_watched(command, environment, ROOT, setting.folder / f"{tool}.log")
    lines = [json.loads(line) for line in scores.read_text().splitlines()][:count]

    def median_step(name: str) -> float:
        pairs = itertools.pairwise(line[name] for line in lines)
        return float(statistics.median(after - before for before, after in pairs))

    row = Row(
        setting.dtype,
        setting.method,
        tool,
        first=lines[0]["seconds"],
        trial=median_step("seconds"),
        cpu=median_step("cpu"),
        evaluate=statistics.median(line["evaluate_cpu"] for line in lines[1:]),
        use=use,
    )
    return Trials(row, [line["loss"] for line in lines])


def ours(setting: Setting) -> tuple[Trials, list[list[float]]]:
    """Our row, and the points of its trials."""
    run = setting.folder / f"run {setting.method} {os.getpid()}"
    study = setting.folder / f"{setting.method}.yaml"
    study.write_text(json.dumps(_study(setting)))
    command = [sys.executable, "-m", "mergesearch", "run", str(study), "--run", str(run)]
    trials = run_tool(setting, "mergesearch", command, TRIALS)
    records = [record for record in open_run(run).log.records if record.kind == "search"]
    points = [record.point.tolist() for record in records if record.point is not None]
    return trials, points


def _study(setting: Setting) -> dict[str, Any]:
    """The study file of ours."""
    options = {"density": 0.2, "scope": "tensor"} if setting.method == "ties" else {}
    return {
        "name": setting.method,
        "base": str(setting.folder / "base"),
        "experts": {name: str(setting.folder / name) for name in EXPERTS},
        "operator": {"name": setting.method, **options},
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
        "workers": {"threads": setting.threads},
    }


def theirs(setting: Setting, own: Trials, tool: str, points: Sequence[list[float]]) -> Row:
    """A peer's row, compared with ours."""
    data = {
        "base": str(setting.folder / "base"),
        "experts": [str(setting.folder / name) for name in EXPERTS],
        "method": setting.method,
        "points": points[:THEIRS],
        "dtype": setting.dtype,
        "threads": setting.threads,
        "out": str(setting.folder / "merged"),
    }
    file = setting.folder / "setting.json"
    file.write_text(json.dumps(data))
    command = [str(PEERS), "-m", f"experiments.bench.peers.{tool}", str(file)]
    trials = run_tool(setting, tool, command, THEIRS)
    row = trials.row
    pairs = list(zip(trials.losses, own.losses, strict=False)) if tool in COMPARED else []
    return replace(
        row,
        ratio=row.cpu / own.row.cpu,
        merge=(row.cpu - row.evaluate) / (own.row.cpu - own.row.evaluate),
        bound=row.cpu / own.row.evaluate,
        apart=max((abs(a - b) / abs(b) for a, b in pairs), default=None),
    )


def measure(setting: Setting) -> Iterator[Row]:
    """Rows of one dtype and method, one after the other."""
    own, points = ours(setting)
    yield replace(own.row, bound=own.row.cpu / own.row.evaluate)
    for tool, methods in TOOLS.items():
        if setting.method in methods:
            yield theirs(setting, own, tool, points)


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="keep checkpoints here, and use them again")
    options = parser.parse_args()
    if not PEERS.exists():
        print("peers: no .venv-peers to compare with; `make peers` creates it")
        return
    count = parameters(options.size)
    print(f"peers: {count:,} parameters, {len(EXPERTS)} experts, {options.threads} threads")
    print(f"{'dtype':<9} {'method':<16} {'tool':<16}" + "".join(f"{h:>8}" for h in HEADS), "apart")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as place:
        for dtype in options.dtypes:
            folder = (options.models or Path(place)) / dtype
            write_models(folder, dtype, options.size)
            for method in options.methods:
                for row in measure(Setting(folder, dtype, method, options.threads)):
                    rows.append(row)
                    _print(row)
    print(json.dumps({"peers": [asdict(row) for row in rows]}))


def _print(row: Row) -> None:
    bar = BARS.get(row.tool)
    verdict = (
        "" if bar is None else f" (bar {bar:g}: {'reached' if row.ratio >= bar else 'MISSED'})"
    )
    apart = "" if row.apart is None else f"{row.apart:.1e}"
    seconds = (row.first, row.trial, row.cpu, row.evaluate)
    ratios = (row.ratio, row.merge, row.bound)
    use = row.use
    sizes = (use.own, use.mapped, use.peak, use.read, use.written)
    print(
        f"{row.dtype:<9} {row.method:<16} {row.tool:<16}"
        + "".join(f"{value:>8.3f}" for value in seconds)
        + "".join(f"{value:>8.1f}" for value in ratios)
        + "".join(f"{value / 1e9:>8.2f}" for value in sizes),
        f"{apart}{verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()
