"""Compares a write that merges only what has changed with one that merges everything.

``python -m experiments.bench.changed`` prints a table and, as its last line, the same figures as
JSON: 50M parameters in 300 tensors and 4,000 segments, four bf16 experts as they are stored, in a
resident model. Between two writes the coefficients of some segments change: of segments side by
side or of whole tensors anywhere, as groups are, or of single segments anywhere, the worst case,
for which there is no bar. Every write ends with the check of its values, as in a trial. Variants
take turns; every ratio is of two times of one round, in seconds of the processor, and the median
counts.

With two threads, torch's own spin on after a sum and are counted for what comes next; set
``OMP_WAIT_POLICY=passive`` against that.

``plain`` is a whole merge and its check without any memory of the write before: what 100 % changed
may cost a fiftieth more than.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mergesearch.merging import Field, Layout
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.encodings.packing import Packing, StoredColumn, StoredTensor
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.terms import combine_terms

PARAMETERS = 50_000_000
TENSORS = 300
SEGMENTS = 4000
DIRECTIONS = 4
ROUNDS = 15

#: Share of the weights that change -> what a write may take of a whole one.
BARS = {0.25: 0.30, 1.0: 1.02}
SHARES = (0.0, 0.1, 0.25, 1.0)
PLACES = ("together", "tensors", "anywhere")

#: Of each round: seconds of the processor, and of a clock.
_Times = list[tuple[float, float]]


@dataclass(frozen=True)
class Figures:
    """One share of changed segments with a given number of threads; medians over the rounds.

    Attributes:
        changed: Share of the weights, about.
        where: One of :data:`PLACES`.
        threads: Number of CPU threads.
        milliseconds: Of a write, in seconds of the processor.
        ratio: Of its time to that of the plain merge.
        wall_ratio: The same of seconds of a clock, which neighbours disturb.
        read_share: Bytes of base and rows that the plain merge reads per second of the processor,
            over those of a pure read.
    """

    changed: float
    where: str
    threads: int
    milliseconds: float
    ratio: float
    wall_ratio: float
    read_share: float


class _Weights(nn.Module):
    """Parameters under the names of a layout."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        for spec in layout.tensors:
            dtype = getattr(torch, spec.dtype)
            self.register_parameter(spec.name, nn.Parameter(torch.zeros(spec.shape, dtype=dtype)))


@dataclass(frozen=True, eq=False)
class Problem:
    """A resident model of bf16 experts, and fields of which some segments differ."""

    merged: MergedModel
    field: Field
    others: Mapping[tuple[float, str], Field]

    @classmethod
    def make(cls, parameters: int, segments: int, threads: int) -> Problem:
        """Tensors of equal size; segments end anywhere."""
        shape = (max(parameters // TENSORS // 64, 1), 64)
        layout = Layout.build({f"layer_{i}_weight": (shape, "bfloat16") for i in range(TENSORS)})
        stored = StoredTensor("bfloat16", (StoredColumn("bfloat16", minus_base=True),) * DIRECTIONS)
        packing = Packing(layout, DIRECTIONS, "float32", dict.fromkeys(layout.names, stored))
        generator = np.random.default_rng(0)
        few = torch.from_numpy(generator.standard_normal(1 << 20, dtype=np.float32) * 0.02)
        pattern = few.bfloat16().view(torch.uint8).numpy()
        memory = np.resize(pattern, packing.size)
        arenas = Arenas(layout, "delta", memory, packing)
        merged = MergedModel(_Weights(layout), arenas, threads=threads)
        starts = [spec.start for spec in layout.tensors]
        free = np.setdiff1d(np.arange(64, layout.size, 7), starts)
        cuts = generator.choice(free, segments - TENSORS, replace=False)
        edges = np.sort(np.concatenate((starts, cuts, [layout.size])))
        field = Field(edges, generator.uniform(0.1, 0.9, (DIRECTIONS, segments)))
        others = {
            (share, where): _moved(field, starts, share, where, generator)
            for share in SHARES
            for where in (PLACES if 0 < share < 1 else PLACES[:1])
        }
        return cls(merged, field, others)

    def plain(self) -> None:
        """A whole merge and its check, as writes were before they knew the last one."""
        (shard,) = self.merged.shards
        self.merged.check_binding()
        with torch.no_grad():
            combine_terms(shard.terms, self.field, shard.merged, threads=self.merged._threads)
            assert bool(torch.isfinite(shard.merged.sum()))


def _moved(
    field: Field, starts: Sequence[int], share: float, where: str, generator: np.random.Generator
) -> Field:
    """The field with other coefficients in a share of its positions, about.

    Args:
        field: Of all tensors.
        starts: First positions of the tensors.
        share: Of the positions.
        where: One of :data:`PLACES`.
        generator: Chooses them.
    """
    begins = field.boundaries[:-1]
    wanted = share * field.size
    if where == "together":
        first = generator.uniform(0, field.size - wanted)
        chosen = (begins >= first) & (begins < first + wanted) if share < 1 else begins >= 0
    else:
        owner = np.arange(field.segments)
        if where == "tensors":
            owner = np.searchsorted(starts, begins, side="right")
        drawn = generator.permutation(owner.max() + 1)
        lengths = np.bincount(owner, np.diff(field.boundaries), minlength=len(drawn))
        chosen = np.isin(owner, drawn[np.cumsum(lengths[drawn]) <= wanted])
    return Field(field.boundaries, field.values + 0.05 * chosen)


def measure(problem: Problem, threads: int, rounds: int) -> list[Figures]:
    """Figures of every share with ``threads`` threads."""
    torch.set_num_threads(threads)
    (shard,) = problem.merged.shards
    memory = torch.from_numpy(shard.terms.memory[: len(shard.terms.memory) // 8 * 8])
    numbers = memory.view(torch.float64).view(torch.int64)

    def write(other: Field) -> Callable[[], None]:
        """A write of another field than the one that lies in the model."""
        return lambda: problem.merged.write(other)

    variants: dict[Any, Callable[[], Any]] = {"read": numbers.sum, "plain": problem.plain}
    variants |= {key: write(other) for key, other in problem.others.items()}
    times = _rounds(problem, variants, rounds)
    rates = [
        plain / (read * _read_bytes(problem) / memory.nbytes)
        for (plain, _), (read, _) in zip(times["plain"], times["read"], strict=True)
    ]
    return [
        Figures(
            share,
            where,
            threads,
            1e3 * statistics.median(cpu for cpu, _ in times[share, where]),
            _ratio(times[share, where], times["plain"], 0),
            _ratio(times[share, where], times["plain"], 1),
            1 / statistics.median(rates),
        )
        for share, where in problem.others
    ]


def _read_bytes(problem: Problem) -> int:
    (shard,) = problem.merged.shards
    return shard.layout.parameters * 2 * (DIRECTIONS + 1)


def _ratio(times: _Times, others: _Times, clock: int) -> float:
    pairs = zip(times, others, strict=True)
    return statistics.median(one[clock] / other[clock] for one, other in pairs)


def _rounds(
    problem: Problem, variants: Mapping[Any, Callable[[], Any]], rounds: int
) -> dict[Any, _Times]:
    """Processor and wall seconds of every variant in every round, after one to warm up.

    Before each the field lies in the model.
    """
    seconds: dict[Any, _Times] = {name: [] for name in variants}
    for number in range(rounds + 1):
        problem.merged.forget()
        for name, variant in variants.items():
            if name not in ("read", "plain"):
                problem.merged.write(problem.field)
            cpu = time.process_time()
            wall = time.perf_counter()
            variant()
            taken = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                seconds[name].append(taken)
    return seconds


def run(
    parameters: int = PARAMETERS, segments: int = SEGMENTS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """All figures as plain data, with one thread and with two."""
    before = torch.get_num_threads()
    try:
        figures = [
            row
            for threads in (1, 2)
            for row in measure(Problem.make(parameters, segments, threads), threads, rounds)
        ]
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "changed ranges",
        "parameters": parameters,
        "segments": segments,
        "figures": [asdict(row) for row in figures],
        "targets": BARS,
        "reached": {
            bar: all(
                row.ratio <= BARS[bar]
                for row in figures
                if row.changed == bar and row.where != "anywhere"
            )
            for bar in BARS
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--segments", type=int, default=SEGMENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args([] if arguments is None else arguments)
    report = run(options.parameters, options.segments, options.rounds)
    print(
        f"changed ranges: {report['parameters']:,} parameters in {report['segments']:,} segments, "
        f"{DIRECTIONS} bf16 experts, median of {options.rounds}"
    )
    print(
        f"{'threads':>7} {'changed':>8} {'where':<9} {'ms':>7} {'of plain':>9} {'wall':>7} "
        f"{'plain reads/read bw':>20}"
    )
    for row in report["figures"]:
        print(
            f"{row['threads']:>7} {row['changed']:>8.0%} {row['where']:<9} "
            f"{row['milliseconds']:>7.1f} {row['ratio']:>9.3f} {row['wall_ratio']:>7.3f} "
            f"{row['read_share']:>20.0%}"
        )
    for bar, reached in report["reached"].items():
        verdict = "reached" if reached else "MISSED"
        print(f"target: {bar:.0%} changed <= {BARS[bar]:g} of plain: {verdict}")
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
