"""Measures a gradient step: its time against the machine's read bandwidth, and its memory.

``python -m experiments.bench.gradient`` prints two tables and, as its last line, the same figures
as JSON. Time: the arrays of the bench of ``combine`` (50M parameters, four directions, 14
segments). Memory: a real ViT with four experts, in a process of its own for every number of tasks;
what a step adds to the process at its peak, beside the bytes of base, basis, merged weights,
gradient, and of what autograd keeps for one task. Libraries are loaded and kernels compiled before;
the allocator gives large blocks back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench.combine import DIRECTIONS, TENSORS, Problem, best_seconds
from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.gradient import coefficient_gradient
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.terms import Terms

EXPERTS = 4
TASKS = (1, 2, 4, 8)
BATCH = 16
MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
#: glibc keeps what is freed for later, unless it is told not to; that would be counted as a task's.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a step with so many tasks.

    Attributes:
        tasks: Batches whose gradients were accumulated, one after the other.
        peak: What the process held at its peak beyond what it held before the arenas were opened.
        listed: Base, basis, merged weights, one gradient, and activations.
        activations: What autograd kept at most.
    """

    tasks: int
    peak: int
    listed: int
    activations: int


def measure_time() -> dict[str, Any]:
    """Milliseconds, and shares of the read bandwidth."""
    problem = Problem.make()
    gradient = np.roll(problem.base, 7)
    terms = Terms.of_arrays(problem.layout, "delta", problem.base, problem.basis)
    rows = [torch.from_numpy(row) for row in problem.basis]
    seconds = best_seconds(
        {
            "read": lambda: [row.sum() for row in rows],
            "gradient": lambda: coefficient_gradient(terms, gradient, problem.field, threads=1),
            "combine": lambda: combine(
                problem.base, problem.basis, problem.field, "delta", problem.out, threads=1
            ),
        }
    )
    one = problem.base.nbytes
    bandwidth = DIRECTIONS * one / seconds["read"]
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "gradient_read_share": (DIRECTIONS + 1) * one / seconds["gradient"] / bandwidth,
        "gradient_over_combine": seconds["gradient"] / seconds["combine"],
        "read_gb_per_s": bandwidth / 1e9,
    }


def write_models(folder: Path) -> None:
    """A random ViT and experts near it."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(image_size=32, patch_size=4, num_labels=100, **MODEL)
        )
    model.save_pretrained(folder / "base")
    for index in range(EXPERTS):
        generator = torch.Generator().manual_seed(index + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"expert-{index}")


def step_memory(folder: Path, tasks: int) -> Memory:
    """Memory of one step: merge, a backward pass for each task, gradient of the coefficients."""
    torch.set_num_threads(1)
    experts = tuple(Source(f"expert-{k}", str(folder / f"expert-{k}")) for k in range(EXPERTS))
    base = Source("base", str(folder / "base"))
    recipe = Recipe(base, experts, "task_arithmetic", Field.constant(1, np.zeros(EXPERTS)))
    open_arenas(recipe, folder / "arenas")  # written, if they are not, before anything is measured
    model = load_model(base.path, "AutoModelForImageClassification")
    _warm_up(model)
    before = _resident("VmRSS") - sum(tensor.nbytes for tensor in model.parameters())
    arenas = open_arenas(recipe, folder / "arenas", verify=False)
    merged = MergedModel(model, arenas)
    merged.enable_gradient()
    starts = [*(spec.start for spec in arenas.layout.tensors if spec.size), arenas.layout.size]
    field = Field(np.array(starts), np.full((EXPERTS, len(starts) - 1), 0.3))
    merged.write(field)
    _forget_peak()
    kept = 0
    most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal kept, most
            # Weights are saved for backward too, but they are the merged buffer.
            inside = 0 <= tensor.data_ptr() - merged.merged.data_ptr() < merged.merged.nbytes
            self.tensor = tensor
            self.bytes = 0 if inside else tensor.nbytes
            kept += self.bytes
            most = max(most, kept)

        def __del__(self) -> None:
            nonlocal kept
            kept -= self.bytes

    generator = torch.Generator().manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        for _ in range(tasks):
            images = torch.randn((BATCH, 3, 32, 32), generator=generator)
            log_p = merged.model(pixel_values=images).logits.log_softmax(-1)
            torch.autograd.backward(-(log_p.exp() * log_p).sum(-1).mean())
    merged.gradient(field)
    listed = arenas.memory.nbytes + 2 * merged.merged.nbytes + most
    return Memory(tasks, _resident("VmHWM") - before, listed, most)


def _warm_up(model: Any) -> None:
    """Load libraries and compile kernels, on one image and small arrays."""
    images = torch.zeros((1, 3, 32, 32))
    torch.autograd.backward(model(pixel_values=images).logits.sum())
    model.zero_grad(set_to_none=True)
    small = Problem.make(TENSORS * 64)
    combine(small.base, small.basis, small.field, "delta", small.out, threads=1)
    terms = Terms.of_arrays(small.layout, "delta", small.base, small.basis)
    coefficient_gradient(terms, small.base, small.field, threads=1)


def _resident(key: str) -> int:
    """Bytes of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory() -> list[Memory]:
    """A step with each number of tasks."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        rows = []
        for tasks in (TASKS[0], *TASKS):  # the first writes the arenas
            command = [
                sys.executable,
                "-m",
                "experiments.bench.gradient",
                "--folder",
                folder,
                "--tasks",
                str(tasks),
            ]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | ALLOCATOR
            )
            rows.append(Memory(**json.loads(done.stdout.splitlines()[-1])))
    return rows[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args([] if arguments is None else arguments)
    if options.folder is not None:
        print(json.dumps(asdict(step_memory(options.folder, options.tasks))))
        return
    timed = measure_time()
    rows = measure_memory()
    print("gradient of coefficients: 50M parameters, 4 directions, fp32, one thread")
    print(
        f"  {timed['milliseconds']['gradient']:.1f} ms, {timed['gradient_read_share']:.0%} of read "
        "bandwidth "
        f"({timed['read_gb_per_s']:.1f} GB/s), {timed['gradient_over_combine']:.2f}x combine"
    )
    print(f"memory of a step: ViT of 25M parameters, {EXPERTS} experts, batches of {BATCH}, MB")
    print(
        f"{'tasks':>7} {'peak':>7} {'base + basis + merged + gradient + activations':>50} "
        f"{'of these activations':>22}"
    )
    for row in rows:
        print(
            f"{row.tasks:>7} {row.peak / 1e6:>7.0f} {row.listed / 1e6:>50.0f} "
            f"{row.activations / 1e6:>22.0f}"
        )
    spread = max(row.peak for row in rows) / min(row.peak for row in rows)
    fits = all(row.peak <= row.listed for row in rows)
    print(
        f"at most what is listed: {'reached' if fits else 'MISSED'}; largest over smallest peak: "
        f"{spread:.3f}"
    )
    print(
        json.dumps(
            {"benchmark": "gradient", "time": timed, "memory": [asdict(row) for row in rows]}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
