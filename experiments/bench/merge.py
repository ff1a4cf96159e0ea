"""Compares ``mergesearch merge`` with ``mergekit-yaml`` on the same checkpoints and threads.

``python -m experiments.bench.merge`` writes a Llama-shaped base and three experts in bf16 and in
fp32, merges them with both tools as separate processes that take turns, and prints a table and, as
its last line, the same figures as JSON. ``--methods`` and ``--dtypes`` take a part of it,
``--rounds`` the number of turns, ``--size 0.5B`` a larger model. Checkpoints lie in the page cache.
"inside" is the merge call alone, without the start of the process and the loading of libraries,
which "wall" has. Bytes are those of the inputs that take part and of the output. Ours is flushed to
disk and says what every input and the output are (SHA-256; of inputs remembered from the first turn
on), which mergekit does neither of.

The machine's own limit stands beside them in every turn ("plain"): the inputs read through a
mapping and as many bytes as the output written and flushed, with nothing else done to them. "write
s" are the seconds of writing and flushing, of ours summed over threads, and "maps" is how many
times each byte of the inputs was mapped by ours.

mergekit's threads (torch's) wait for one another by turning in circles, which counts as CPU time:
``--threads 1`` compares the work itself.

Needs ``.venv-peers`` (``make peers``), prints one line without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.bench.merge_methods import METHODS, Method
from experiments.bench.peers.models import EXPERTS, SIZES, parameters, write_models

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
THREADS = 2
ROUNDS = 2
DTYPES = ("bfloat16", "float32")

#: All programs print one line of JSON: seconds and CPU seconds of what is measured, and more.
_CLOCK = """
import json, sys, time
def timed(call, more=dict):
    def run(*arguments, **options):
        start, cpu = time.perf_counter(), time.process_time()
        result = call(*arguments, **options)
        seconds = {"inside": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print("inside " + json.dumps({**seconds, **more()}), file=sys.stderr)
        return result
    return run
"""

#: Both programs as users start them, with a clock around the function that merges.
OURS = (
    _CLOCK
    + """
# What the call would load.
import mergesearch.merging.export.folder as folder, mergesearch.merging.in_memory
import mergesearch.merging.export.new_folder as new_folder
import mergesearch.merging.kernels.thinned_numba, mergesearch.merging.kernels.sparse_numba
import mergesearch.merging.kernels.chunks.ranking
import numpy as np
from mergesearch.merging.kernels.source_numba import difference
difference(np.ones(1, np.float32), np.ones(1, np.float32), np.ones(1, np.float32))  # loads numba
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.search.cli.main import main
spent, mapped = [], []
def clocked(call):
    def run(*arguments):
        start = time.perf_counter()
        call(*arguments)
        spent.append(time.perf_counter() - start)
    return run
def counted(checkpoint, name):
    tensor = read(checkpoint, name)
    mapped.append(tensor.nbytes)
    return tensor
read = Checkpoint.read
Checkpoint.read = counted
folder.write_tensor = clocked(folder.write_tensor)
new_folder.sync = clocked(new_folder.sync)
folder.export_model = timed(
    folder.export_model, lambda: {"write": sum(spent), "mapped": sum(mapped)}
)
main()
"""
)
THEIRS = (
    _CLOCK
    + """
import mergekit.scripts.run_yaml as program
program.run_merge = timed(program.run_merge)
program.main()
"""
)
#: Arguments: the file to write, and those to read.
PLAIN = (
    _CLOCK
    + """
import mmap, os, numpy as np
out, *sources = sys.argv[1:]
block = 1 << 23
numbers = np.ones(block, np.uint8)
spent = []
def move():
    for source in sources:
        with open(source, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for start in range(0, len(pages) - block, block):
                np.frombuffer(pages, np.uint64, block // 8, start).max()
    start = time.perf_counter()
    size = os.path.getsize(sources[0])
    os.makedirs(os.path.dirname(out))
    with open(out, "wb", buffering=0) as file:
        for first in range(0, size, block):
            file.write(numbers[: size - first].data)
        os.fsync(file.fileno())
    spent.append(time.perf_counter() - start)
timed(move, lambda: {"write": sum(spent)})()
"""
)


@dataclass(frozen=True)
class Figures:
    """Best of a few runs of one tool.

    Attributes:
        wall: Seconds of the whole process.
        inside: Seconds of the merge call.
        cpu: CPU seconds of the merge call, all threads.
        gb_per_s: Bytes read and written over ``inside``.
        copy_share: ``gb_per_s`` over the machine's copy bandwidth.
        write: Seconds of writing and flushing, summed over threads; None where it is not known.
        maps: How many times each byte of the inputs was mapped; None where it is not known.
    """

    dtype: str
    method: str
    tool: str
    wall: float
    inside: float
    cpu: float
    gb_per_s: float
    copy_share: float
    write: float | None = None
    maps: float | None = None


def write_recipes(folder: Path, method: Method, dtype: str) -> tuple[Path, Path]:
    """The same merge for both tools: (ours, theirs)."""
    ours = folder / "ours.yaml"
    theirs = folder / "theirs.yaml"
    ours.write_text(yaml.safe_dump(method.recipe(folder, EXPERTS)))
    theirs.write_text(yaml.safe_dump(method.config(folder, EXPERTS, dtype)))
    return ours, theirs


def run_tool(
    program: str, python: Path, arguments: Sequence[str], out: Path, threads: int
) -> dict[str, float]:
    """What one run printed, with the seconds of the whole process as ``wall``."""
    shutil.rmtree(out, ignore_errors=True)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - start
    lines = [line for line in done.stderr.splitlines() if line.startswith("inside ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{python} {' '.join(arguments)}: {done.stderr[-2000:]}")
    return {"wall": wall, **json.loads(lines[-1].removeprefix("inside "))}


def copy_bandwidth(threads: int) -> float:
    """GB/s read and written by a copy between two arrays far larger than any cache."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(1 << 26)
        target = torch.zeros(1 << 26)
        best = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * source.nbytes / best / 1e9


@dataclass(frozen=True)
class Runs:
    """How both tools are run.

    Attributes:
        methods: Merges.
        dtypes: Of the checkpoints.
        size: Of the models.
        rounds: Turns of every tool.
        threads: For every tool.
        models: Folder where checkpoints are kept for other runs; None keeps none.
    """

    methods: Sequence[Method] = METHODS
    dtypes: Sequence[str] = DTYPES
    size: str = "124M"
    rounds: int = ROUNDS
    threads: int = THREADS
    models: Path | None = None


def measure(folder: Path, dtype: str, bandwidth: float, runs: Runs) -> Iterator[Figures]:
    """All tools on every method, taking turns."""
    write_models(folder, dtype, runs.size)
    for method in runs.methods:
        yield from _measure_method(folder, dtype, bandwidth, method, runs)


def _measure_method(
    folder: Path, dtype: str, bandwidth: float, method: Method, runs: Runs
) -> Iterator[Figures]:
    one = (folder / "base" / "model.safetensors").stat().st_size
    inputs = (*(("base",) if method.around_base else ()), *EXPERTS[: method.experts])
    out = folder / "out"
    threads = runs.threads
    calls = _calls(folder, dtype, method, inputs, threads)
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in calls}
    for _ in range(runs.rounds):
        for tool, call in calls.items():
            found[tool].append(run_tool(*call, out, threads))
    shutil.rmtree(out, ignore_errors=True)
    for tool, turns in found.items():
        best = {name: min(turn[name] for turn in turns) for name in turns[0]}
        rate = (len(inputs) + 1) * one / best["inside"] / 1e9
        maps = best["mapped"] / (len(inputs) * one) if "mapped" in best else None
        yield Figures(
            dtype,
            method.name,
            tool,
            best["wall"],
            best["inside"],
            best["cpu"],
            rate,
            rate / bandwidth,
            best.get("write"),
            maps,
        )


def _calls(
    folder: Path, dtype: str, method: Method, inputs: Sequence[str], threads: int
) -> dict[str, tuple[str, Path, list[str]]]:
    """Tool -> program, interpreter and arguments."""
    recipe, config = write_recipes(folder, method, dtype)
    out = str(folder / "out")
    python = Path(sys.executable)
    sources = [str(folder / name / "model.safetensors") for name in inputs]
    return {
        "mergesearch": (
            OURS,
            python,
            ["merge", str(recipe), "--out", out, "--threads", str(threads)],
        ),
        "mergekit": (THEIRS, PEERS, [str(config), out, "--no-copy-tokenizer", "--quiet"]),
        "plain": (PLAIN, python, [f"{out}/model.safetensors", *sources]),
    }


def run(show: Callable[[Figures], None] = lambda row: None, runs: Runs = Runs()) -> dict[str, Any]:
    """All figures as plain data, each shown as soon as it is there."""
    bandwidth = copy_bandwidth(runs.threads)
    figures: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as place:
        for dtype in runs.dtypes:
            for row in measure((runs.models or Path(place)) / dtype, dtype, bandwidth, runs):
                show(row)
                figures.append(row)
    return {
        "benchmark": "merge",
        "parameters": parameters(runs.size),
        "experts": len(EXPERTS),
        "threads": runs.threads,
        "copy_gb_per_s": bandwidth,
        "figures": [asdict(row) for row in figures],
        "speedups": [asdict(row) for row in speedups(figures)],
    }


@dataclass(frozen=True)
class Speedup:
    """Ratios over ours: mergekit's seconds, and CPU seconds of the plain read and write.

    ``reached``, by CPU seconds, is None without a target.
    """

    dtype: str
    method: str
    wall: float
    inside: float
    cpu: float
    limit: float
    target: float | None
    reached: bool | None


def speedups(figures: Sequence[Figures]) -> list[Speedup]:
    """One per dtype and method."""
    seconds = {(row.dtype, row.method, row.tool): row for row in figures}
    targets = {method.name: method.target for method in METHODS}
    speedups = []
    for dtype, method, tool in seconds:
        if tool != "mergesearch":
            continue
        ours = seconds[dtype, method, tool]
        theirs = seconds[dtype, method, "mergekit"]
        plain = seconds[dtype, method, "plain"]
        target = targets[method]
        cpu = theirs.cpu / ours.cpu
        speedups.append(
            Speedup(
                dtype,
                method,
                theirs.wall / ours.wall,
                theirs.inside / ours.inside,
                cpu,
                plain.cpu / ours.cpu,
                target,
                None if target is None else cpu >= target,
            )
        )
    return speedups


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {method.name.partition(" ")[0].lower(): method for method in METHODS}
    parser.add_argument("--methods", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--models", type=Path, help="keep checkpoints here, and use them again")
    options = parser.parse_args([] if arguments is None else arguments)
    if not PEERS.exists():
        print("merge: no .venv-peers to compare with; `make peers` creates it")
        return
    chosen = [names[name] for name in options.methods]
    runs = Runs(
        chosen, options.dtypes, options.size, options.rounds, options.threads, options.models
    )
    print(
        f"merge: {parameters(runs.size):,} parameters, {len(EXPERTS)} experts, {runs.threads} "
        f"threads, best of {runs.rounds}"
    )
    heads = f"{'wall s':>7} {'inside s':>9} {'CPU s':>7} {'GB/s':>6} {'of copy':>8}"
    print(f"{'dtype':<9} {'method':<16} {'tool':<12} {heads} write s   maps", flush=True)
    report = run(_show, runs)
    print(f"copy {report['copy_gb_per_s']:.1f} GB/s")
    for row in report["speedups"]:
        verdict = {None: "no target", True: "reached", False: "MISSED"}[row["reached"]]
        target = "" if row["target"] is None else f" (target {row['target']:g}x)"
        print(
            f"{row['dtype']:<9} {row['method']:<16} {row['cpu']:.1f}x in CPU seconds, "
            f"{row['inside']:.1f}x inside, {row['wall']:.1f}x as a process; plain reading and "
            f"writing takes {row['limit']:.0%} of ours{target}: {verdict}"
        )
    print(json.dumps(report))


def _show(row: Figures) -> None:
    write = "" if row.write is None else f" {row.write:>7.2f}"
    maps = "" if row.maps is None else f" {row.maps:>6.2f}"
    print(
        f"{row.dtype:<9} {row.method:<16} {row.tool:<12} {row.wall:>7.2f} {row.inside:>9.2f} "
        f"{row.cpu:>7.2f} {row.gb_per_s:>6.2f} {row.copy_share:>8.1%}{write}{maps}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
