"""Compares ``mergesearch merge`` with ``mergekit-yaml`` on the same checkpoints and threads.

``python -m experiments.bench.merge`` writes a Llama-shaped base and three experts in bf16 and in
fp32, merges them with both tools as separate processes that take turns, and prints a table and, as
its last line, the same figures as JSON. ``--methods`` and ``--dtypes`` take a part of it,
``--rounds`` the number of turns. Checkpoints lie in the page cache. "inside" is the merge
call alone, without the start of the process. Bytes are those of the inputs that take part and of
the output. Ours is flushed to disk and says what every input was (SHA-256), which mergekit does
neither of.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.bench.merge_methods import METHODS, Method

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
THREADS = 2
ROUNDS = 2
DTYPES = ("bfloat16", "float32")

#: The architecture: 124M parameters in 111 tensors.
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EXPERTS = ("one", "two", "three")

#: Both programs as users start them, with a clock around the function that merges.
OURS = """
import sys, time
# What the call would load.
import mergesearch.merging.export.folder, mergesearch.merging.in_memory
import mergesearch.merging.kernels.thinned_numba, mergesearch.merging.kernels.sparse_numba
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from mergesearch.search.cli.main import main
merge = mergesearch.merging.export.folder.export_model
def timed(*arguments, **options):
    start, cpu = time.perf_counter(), time.process_time()
    result = merge(*arguments, **options)
    print("inside", time.perf_counter() - start, time.process_time() - cpu, file=sys.stderr)
    return result
mergesearch.merging.export.folder.export_model = timed
main()
"""
THEIRS = """
import sys, time
import mergekit.scripts.run_yaml as program
merge = program.run_merge
def timed(*arguments, **options):
    start, cpu = time.perf_counter(), time.process_time()
    result = merge(*arguments, **options)
    print("inside", time.perf_counter() - start, time.process_time() - cpu, file=sys.stderr)
    return result
program.run_merge = timed
program.main()
"""


@dataclass(frozen=True)
class Figures:
    """Best of a few runs of one tool.

    Attributes:
        wall: Seconds of the whole process.
        inside: Seconds of the merge call.
        cpu: CPU seconds of the merge call, all threads.
        gb_per_s: Bytes read and written over ``inside``.
        copy_share: ``gb_per_s`` over the machine's copy bandwidth.
    """

    dtype: str
    method: str
    tool: str
    wall: float
    inside: float
    cpu: float
    gb_per_s: float
    copy_share: float


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model."""
    hidden = CONFIG["hidden_size"]
    inner = CONFIG["intermediate_size"]
    vocabulary = CONFIG["vocab_size"]
    block = {
        **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{
            f"model.layers.{i}.{n}": s
            for i in range(CONFIG["num_hidden_layers"])
            for n, s in block.items()
        },
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def write_models(folder: Path, dtype: str) -> None:
    """The base and its experts, task vectors a twentieth of the weights."""
    import torch
    from safetensors.torch import save_file

    for index, name in enumerate(("base", *EXPERTS)):
        model = folder / name
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({**CONFIG, "dtype": dtype}))
        base = np.random.default_rng(0)
        own = np.random.default_rng(index)
        state = {}
        for key, shape in tensor_shapes().items():
            values = 0.02 * base.standard_normal(shape, dtype=np.float32)
            if index:
                values += 0.001 * own.standard_normal(shape, dtype=np.float32)
            state[key] = torch.from_numpy(values).to(getattr(torch, dtype))
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def write_recipes(folder: Path, method: Method, dtype: str) -> tuple[Path, Path]:
    """The same merge for both tools: (ours, theirs)."""
    ours = folder / "ours.yaml"
    theirs = folder / "theirs.yaml"
    ours.write_text(yaml.safe_dump(method.recipe(folder, EXPERTS)))
    theirs.write_text(yaml.safe_dump(method.config(folder, EXPERTS, dtype)))
    return ours, theirs


def run_tool(
    program: str, python: Path, arguments: Sequence[str], out: Path
) -> tuple[float, float, float]:
    """Seconds of one run: (whole process, merge call, CPU seconds of the merge call)."""
    shutil.rmtree(out, ignore_errors=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, **threads, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - start
    inside = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("inside ")]
    if done.returncode or not inside:
        raise RuntimeError(f"{python} {' '.join(arguments)}: {done.stderr[-2000:]}")
    return wall, float(inside[-1][0]), float(inside[-1][1])


def copy_bandwidth() -> float:
    """GB/s read and written by a copy between two arrays far larger than any cache."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
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


def measure(
    folder: Path, dtype: str, bandwidth: float, methods: Sequence[Method], rounds: int
) -> Iterator[Figures]:
    """Both tools on every method, taking turns."""
    write_models(folder, dtype)
    one = (folder / "base" / "model.safetensors").stat().st_size
    for method in methods:
        moved = ((method.experts or len(EXPERTS)) + 1 + method.around_base) * one
        recipe, config = write_recipes(folder, method, dtype)
        out = folder / "out"
        calls = {
            "mergesearch": (
                OURS,
                Path(sys.executable),
                ["merge", str(recipe), "--out", str(out), "--threads", str(THREADS)],
            ),
            "mergekit": (THEIRS, PEERS, [str(config), str(out), "--no-copy-tokenizer", "--quiet"]),
        }
        runs: dict[str, list[tuple[float, float, float]]] = {tool: [] for tool in calls}
        for _ in range(rounds):
            for tool, call in calls.items():
                runs[tool].append(run_tool(*call, out))
        for tool, times in runs.items():
            wall, inside, cpu = (min(column) for column in zip(*times, strict=True))
            rate = moved / inside / 1e9
            yield Figures(dtype, method.name, tool, wall, inside, cpu, rate, rate / bandwidth)


def run(
    show: Callable[[Figures], None] = lambda row: None,
    dtypes: Sequence[str] = DTYPES,
    methods: Sequence[Method] = METHODS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """All figures as plain data, each shown as soon as it is there."""
    bandwidth = copy_bandwidth()
    figures: list[Figures] = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(prefix="bench-merge-") as folder:
            for row in measure(Path(folder), dtype, bandwidth, methods, rounds):
                show(row)
                figures.append(row)
    return {
        "benchmark": "merge",
        "parameters": sum(int(np.prod(shape)) for shape in tensor_shapes().values()),
        "experts": len(EXPERTS),
        "threads": THREADS,
        "copy_gb_per_s": bandwidth,
        "figures": [asdict(row) for row in figures],
        "speedups": [asdict(row) for row in speedups(figures)],
    }


@dataclass(frozen=True)
class Speedup:
    """Ratios of wall and CPU seconds, theirs over ours; ``reached`` is None without a target."""

    dtype: str
    method: str
    wall: float
    inside: float
    cpu: float
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
        inside = theirs.inside / ours.inside
        target = targets[method]
        reached = None if target is None else inside >= target
        wall = theirs.wall / ours.wall
        speedups.append(
            Speedup(dtype, method, wall, inside, theirs.cpu / ours.cpu, target, reached)
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
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args([] if arguments is None else arguments)
    if not PEERS.exists():
        print("merge: no .venv-peers to compare with; `make peers` creates it")
        return
    parameters = sum(int(np.prod(shape)) for shape in tensor_shapes().values())
    print(
        f"merge: {parameters:,} parameters, {len(EXPERTS)} experts, {THREADS} threads, best of "
        f"{options.rounds}"
    )
    heads = f"{'wall s':>7} {'inside s':>9} {'CPU s':>7} {'GB/s':>6} {'of copy':>8}"
    print(f"{'dtype':<9} {'method':<16} {'tool':<12} {heads}", flush=True)
    chosen = [names[name] for name in options.methods]
    report = run(_show, options.dtypes, chosen, options.rounds)
    print(f"copy {report['copy_gb_per_s']:.1f} GB/s")
    for row in report["speedups"]:
        verdict = {None: "no target", True: "reached", False: "MISSED"}[row["reached"]]
        target = "" if row["target"] is None else f" (target {row['target']:g}x)"
        print(
            f"{row['dtype']:<9} {row['method']:<16} {row['inside']:.1f}x inside, {row['cpu']:.1f}x "
            "in CPU seconds, "
            f"{row['wall']:.1f}x as a process{target}: {verdict}"
        )
    print(json.dumps(report))


def _show(row: Figures) -> None:
    print(
        f"{row.dtype:<9} {row.method:<16} {row.tool:<12} {row.wall:>7.2f} {row.inside:>9.2f} "
        f"{row.cpu:>7.2f} "
        f"{row.gb_per_s:>6.2f} {row.copy_share:>8.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
