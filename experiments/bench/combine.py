"""Compares ``combine`` with the machine's memory bandwidth and with a plain loop.

``python -m experiments.bench.combine`` prints a table and, as its last line, the same figures as
JSON: 50M parameters in 110 tensors and 14 groups, four directions, fp32. Variants take turns and
the best time of each counts, so that a neighbour's load hits all of them alike; only the ratios are
worth quoting. ``ties`` is live TIES: vectors trimmed to a fifth, signs elected anew in the trial.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergesearch.merging import Field, Layout
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.forms import Form, Kernel

PARAMETERS = 50_000_000
TENSORS = 110
GROUPS = 14
DIRECTIONS = 4
ROUNDS = 12

#: Standard deviations beyond which a fifth of a normal distribution lies.
KEPT_FROM = 1.2816

#: What the kernel must reach: share of the read bandwidth, and times faster than the naive loop
#: (one thread).
READ_SHARE = 0.70
SPEEDUP = 5.0

#: What live TIES may cost: times task arithmetic on the same vectors (one thread).
TIES_RATIO = 2.0


@dataclass(frozen=True)
class Figures:
    """One variant with a given number of threads.

    Attributes:
        milliseconds: Best time of one merge.
        read_share: Bytes read per second over the bandwidth of a pure read; the write comes on top.
        moved_share: The same with the written bytes counted.
        speedup: Times faster than the naive loop with the same number of threads.
    """

    variant: str
    threads: int
    milliseconds: float
    read_share: float
    moved_share: float
    speedup: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Random arenas in 14 segments: base and out ``(n,)``, basis and trimmed ``(4, n)``."""

    layout: Layout
    base: npt.NDArray[np.float32]
    basis: npt.NDArray[np.float32]
    trimmed: npt.NDArray[np.float32]
    out: npt.NDArray[np.float32]
    field: Field

    @classmethod
    def make(cls, parameters: int = PARAMETERS) -> Problem:
        """Tensors of equal size, cut into groups at tensor boundaries."""
        layout = Layout.build(
            {f"layer.{i}.weight": ((parameters // TENSORS,), "float32") for i in range(TENSORS)}
        )
        generator = np.random.default_rng(0)
        base = generator.standard_normal(layout.size, dtype=np.float32) * np.float32(0.02)
        # Directions are shifted copies: as good as fresh numbers for bandwidth, and ten times
        # quicker to make.
        basis = np.stack([np.roll(base, k + 1) for k in range(DIRECTIONS)]) * np.float32(0.05)
        starts = list(layout.segment_starts())
        edges = [starts[TENSORS * group // GROUPS] for group in range(GROUPS)]
        values = generator.uniform(0.1, 0.9, (DIRECTIONS, GROUPS))
        trimmed = np.where(np.abs(basis) > KEPT_FROM * np.float32(0.001), basis, np.float32(0))
        return cls(
            layout,
            base,
            basis,
            trimmed,
            np.zeros_like(base),
            Field(np.array([*edges, layout.size]), values),
        )

    def views(self, array: npt.NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """A state dict of views into a flat array."""
        flat = torch.from_numpy(array)
        return {spec.name: flat[spec.start : spec.stop] for spec in self.layout.tensors}


def naive_merge(problem: Problem) -> Callable[[], None]:
    """The plain merge: a new state dict, tensor by tensor, copied into the model."""
    base = problem.views(problem.base)
    model = problem.views(problem.out)
    vectors = [problem.views(row) for row in problem.basis]
    starts = [spec.start for spec in problem.layout.tensors]
    coefficients = dict(zip(problem.layout.names, problem.field.at(starts).T.tolist(), strict=True))

    def merge() -> None:
        state = {}
        for name, tensor in base.items():
            merged = tensor.clone()
            for coefficient, vector in zip(coefficients[name], vectors, strict=True):
                merged = merged + coefficient * vector[name]
            state[name] = merged
        for name, tensor in state.items():
            model[name].copy_(tensor)

    return merge


def best_seconds(
    variants: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Best time of each variant over rounds in which all run once, after a round to warm up."""
    best = dict.fromkeys(variants, float("inf"))
    for number in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(problem: Problem, threads: int) -> tuple[list[Figures], dict[str, float]]:
    """Figures of every variant, and bandwidths in GB/s, with ``threads`` threads."""
    torch.set_num_threads(threads)
    basis = torch.from_numpy(problem.basis)
    source = torch.from_numpy(problem.base)
    target = torch.from_numpy(problem.out)

    def run_kernel(kernel: Kernel, form: Form = "delta") -> None:
        rows = problem.basis if form == "delta" else problem.trimmed
        combine(
            problem.base, rows, problem.field, form, problem.out, kernel=kernel, threads=threads
        )

    seconds = best_seconds(
        {
            "read": lambda: basis.sum(),
            "copy": lambda: target.copy_(source),
            "naive": naive_merge(problem),
            "torch": lambda: run_kernel("torch"),
            "numba": lambda: run_kernel("numba"),
            "ties": lambda: run_kernel("numba", "elect_mean"),
        }
    )
    one = problem.base.nbytes
    bandwidth = {
        "read": DIRECTIONS * one / seconds["read"] / 1e9,
        "copy": 2 * one / seconds["copy"] / 1e9,
    }
    figures = [
        Figures(
            variant=name,
            threads=threads,
            milliseconds=seconds[name] * 1e3,
            read_share=(DIRECTIONS + 1) * one / seconds[name] / 1e9 / bandwidth["read"],
            moved_share=(DIRECTIONS + 2) * one / seconds[name] / 1e9 / bandwidth["read"],
            speedup=seconds["naive"] / seconds[name],
        )
        for name in ("naive", "torch", "numba", "ties")
    ]
    return figures, bandwidth


def run(parameters: int = PARAMETERS) -> dict[str, Any]:
    """All figures as plain data, with one thread and with two."""
    before = torch.get_num_threads()
    problem = Problem.make(parameters)
    try:
        results = {threads: measure(problem, threads) for threads in (1, 2)}
    finally:
        torch.set_num_threads(before)
    numba, ties = (
        next(f for f in results[1][0] if f.variant == name) for name in ("numba", "ties")
    )
    return {
        "benchmark": "combine",
        "parameters": problem.layout.parameters,
        "directions": DIRECTIONS,
        "figures": [asdict(figures) for rows, _ in results.values() for figures in rows],
        "bandwidth_gb_per_s": {threads: bandwidth for threads, (_, bandwidth) in results.items()},
        "target": {"read_share": READ_SHARE, "speedup": SPEEDUP},
        "reached": numba.read_share >= READ_SHARE and numba.speedup >= SPEEDUP,
        "live_ties": ties.milliseconds / numba.milliseconds,
        "live_ties_target": TIES_RATIO,
    }


def main() -> None:
    """Print the table, then one line of JSON."""
    report = run()
    print(
        f"combine: {report['parameters']:,} parameters, {DIRECTIONS} directions, fp32, best of "
        f"{ROUNDS}"
    )
    print(
        f"{'threads':>7} {'variant':<8} {'ms':>7} {'reads/read bw':>14} {'moved/read bw':>14} "
        f"{'x naive':>8}"
    )
    for row in report["figures"]:
        print(
            f"{row['threads']:>7} {row['variant']:<8} {row['milliseconds']:>7.1f} "
            f"{row['read_share']:>14.0%} "
            f"{row['moved_share']:>14.0%} {row['speedup']:>8.1f}"
        )
    for threads, bandwidth in report["bandwidth_gb_per_s"].items():
        print(
            f"{threads:>7} bandwidth: read {bandwidth['read']:.1f} GB/s, copy "
            f"{bandwidth['copy']:.1f} GB/s"
        )
    verdict = "reached" if report["reached"] else "MISSED"
    print(
        f"target (numba, one thread): reads >= {READ_SHARE:.0%} of read bandwidth, >= {SPEEDUP:g}x "
        f"naive: {verdict}"
    )
    verdict = "reached" if report["live_ties"] <= TIES_RATIO else "MISSED"
    ratio = report["live_ties"]
    print(
        f"target (one thread): live TIES <= {TIES_RATIO:g}x task arithmetic, measured "
        f"{ratio:.2f}x: {verdict}"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
