"""Compares a merge of rows as they are stored with one of fp32 rows, and with the read bandwidth.

``python -m experiments.bench.stored`` prints a table and, as its last line, the same figures as
JSON: 50M parameters in 14 segments, four bf16 experts, kept in every encoding. ``fp32 rows`` is
what the other merges are compared with: base and rows in fp32, merged into fp32. All others write
bf16. Variants take turns; every ratio is of two times of one round, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.bench.combine import DIRECTIONS, GROUPS
from mergesearch.merging import Field
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.span_dispatch import combine_spans
from mergesearch.merging.kernels.spans import PACK_BLOCK, SCALE_BLOCK, Column, Span

PARAMETERS = 50_000_000
ROUNDS = 9

#: What a merge of stored bf16 experts may take, of the time of one of fp32 rows.
RATIO = 0.6

#: Share of elements that packed rows keep: the density of TIES.
PACKED = 0.2

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Figures:
    """One encoding with a given number of threads; medians over the rounds.

    Attributes:
        encoding: How rows are kept.
        threads: Number of CPU threads.
        bytes_read: A parameter, base and rows.
        milliseconds: Of a merge.
        ratio: Of its time to that of fp32 rows.
        read_share: Bytes read per second over the bandwidth of a pure read; the write comes on top.
    """

    encoding: str
    threads: int
    bytes_read: float
    milliseconds: float
    ratio: float
    read_share: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Base and rows in fp32, ``(n,)`` each, and an arena with the same rows in every encoding."""

    base: npt.NDArray[np.float32]
    rows: Sequence[npt.NDArray[np.float32]]
    memory: Bytes
    spans: Mapping[str, Span]
    field: Field

    @classmethod
    def make(cls, parameters: int) -> Problem:
        """bf16 experts near a bf16 base; masks keep half of their elements, packed rows a fifth."""
        size = parameters // 1024 * 1024
        generator = np.random.default_rng(0)
        numbers = torch.from_numpy(generator.standard_normal(size, dtype=np.float32)) * 0.02
        base = numbers.bfloat16()
        # Shifted copies: as good as fresh numbers, and ten times quicker to make.
        experts = [(numbers + 0.05 * numbers.roll(k + 1)).bfloat16() for k in range(DIRECTIONS)]
        rows = [(expert.float() - base.float()).numpy() for expert in experts]
        arena = _Arena()
        origin = Column("bfloat16", arena.put(base.view(torch.uint8).numpy()))
        offsets = [arena.put(expert.view(torch.uint8).numpy()) for expert in experts]
        masks = [arena.put(generator.integers(0, 256, size // 8, dtype=np.uint8)) for _ in experts]
        masked = [
            Column("bfloat16", at, minus_base=True, scale=2.0, mask=mask)
            for at, mask in zip(offsets, masks, strict=True)
        ]
        disjoint = [
            Column("bfloat16", at, minus_base=True, mask=mask)
            for at, mask in zip(offsets, masks, strict=True)
        ]
        packed = [
            _packed_column(arena, expert, generator.random(size, dtype=np.float32) < PACKED)
            for expert in experts
        ]
        columns = {
            "stored": [Column("bfloat16", at, minus_base=True) for at in offsets],
            "masked": masked,
            "shared": disjoint,
            "packed": [replace(column, scale=2.0) for column in packed],
            "packed shared": packed,
            "int8": [_int8_column(arena, row) for row in rows],
            "bf16": [Column("bfloat16", at) for at in offsets],
            "dense": [Column("float32", arena.put(row.view(np.uint8))) for row in rows],
        }
        spans = {
            name: Span(0, size, origin, tuple(columns), "shared" in name)
            for name, columns in columns.items()
        }
        edges = np.linspace(0, size // 64, GROUPS + 1).astype(np.int64) * 64
        field = Field(edges, generator.uniform(0.1, 0.9, (DIRECTIONS, GROUPS)))
        return cls(base.float().numpy(), rows, arena.memory(), spans, field)


class _Arena:
    """Arrays put together, each at a multiple of 64 bytes."""

    def __init__(self) -> None:
        self._parts: list[Bytes] = []
        self._used = 0

    def put(self, part: Bytes) -> int:
        """Append an array; returns its offset."""
        start = self._used
        flat = part.reshape(-1)
        self._parts += [flat, np.zeros(-flat.size % 64, np.uint8)]
        self._used += flat.size + self._parts[-1].size
        return start

    def memory(self) -> Bytes:
        """All of them."""
        return np.concatenate(self._parts)


def _int8_column(arena: _Arena, row: npt.NDArray[np.float32]) -> Column:
    blocks = row.reshape(-1, SCALE_BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    numbers = np.round(blocks / scales).astype(np.int8)
    return Column(
        "int8", arena.put(numbers.view(np.uint8)), scales=arena.put(scales.view(np.uint8))
    )


def _packed_column(arena: _Arena, expert: torch.Tensor, kept: npt.NDArray[np.bool_]) -> Column:
    per_block = kept.reshape(-1, PACK_BLOCK).sum(axis=1, dtype=np.int32)
    starts = (np.cumsum(per_block) - per_block).astype(np.int32)
    numbers = expert.view(torch.int16).numpy()[kept]
    return Column(
        "bfloat16",
        arena.put(numbers.view(np.uint8)),
        minus_base=True,
        mask=arena.put(np.packbits(kept, bitorder="little")),
        starts=arena.put(starts.view(np.uint8)),
        count=numbers.size,
    )


def bytes_of(span: Span) -> float:
    """Bytes a parameter of base and rows."""
    bits = {"float32": 32, "bfloat16": 16, "int8": 8 + 32 / SCALE_BLOCK}
    size = span.stop - span.start
    total = 0.0
    for column in (span.base, *span.rows):
        packed = column.starts is not None
        total += bits[column.dtype] * (column.count / size if packed else 1)
        total += (column.mask is not None) + packed * 32 / PACK_BLOCK
    return total / 8


def measure(problem: Problem, threads: int, rounds: int) -> list[Figures]:
    """Figures of every encoding with ``threads`` threads."""
    torch.set_num_threads(threads)
    size = problem.field.size
    narrow = torch.zeros(size, dtype=torch.bfloat16)
    wide = np.zeros(size, np.float32)
    rows = [torch.from_numpy(row) for row in problem.rows]

    def stored(name: str, form: Form = "delta") -> Callable[[], None]:
        span = problem.spans[name]
        return lambda: combine_spans(
            problem.memory, [span], problem.field, form, narrow, threads=threads
        )

    def plain(form: Form) -> Callable[[], None]:
        return lambda: combine(
            problem.base, problem.rows, problem.field, form, wide, threads=threads
        )

    variants: dict[str, Callable[[], Any]] = {
        "read": lambda: [row.sum() for row in rows],
        "fp32 rows": plain("delta"),
        **{name: stored(name) for name in problem.spans},
        "fp32 rows elected": plain("elect_mean"),
        "stored elected": stored("stored", "elect_mean"),
    }
    seconds = _rounds(variants, rounds)
    rates = [DIRECTIONS * 4 * size / second for second in seconds["read"]]
    figures = []
    for name in list(variants)[1:]:
        span = problem.spans.get(name.removesuffix(" elected"))
        read = 4.0 * (DIRECTIONS + 1) if span is None else bytes_of(span)
        times = seconds[name]
        pairs = zip(times, seconds["fp32 rows"], strict=True)
        shares = (read * size / s / rate for s, rate in zip(times, rates, strict=True))
        figures.append(
            Figures(
                name,
                threads,
                read,
                1e3 * statistics.median(times),
                statistics.median(one / other for one, other in pairs),
                statistics.median(shares),
            )
        )
    return figures


def _rounds(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run(parameters: int = PARAMETERS, rounds: int = ROUNDS) -> dict[str, Any]:
    """All figures as plain data, with one thread and with two."""
    before = torch.get_num_threads()
    problem = Problem.make(parameters)
    try:
        figures = [row for threads in (1, 2) for row in measure(problem, threads, rounds)]
    finally:
        torch.set_num_threads(before)
    ratios = [row.ratio for row in figures if row.encoding == "stored"]
    return {
        "benchmark": "stored rows",
        "parameters": problem.field.size,
        "directions": DIRECTIONS,
        "figures": [asdict(row) for row in figures],
        "target": RATIO,
        "ratios": ratios,
        "reached": max(ratios) <= RATIO,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args([] if arguments is None else arguments)
    report = run(options.parameters, options.rounds)
    print(
        f"stored rows: {report['parameters']:,} parameters, {DIRECTIONS} directions, median of "
        f"{options.rounds}"
    )
    print(
        f"{'threads':>7} {'encoding':<18} {'bytes':>6} {'ms':>7} {'of fp32 rows':>13} "
        f"{'reads/read bw':>14}"
    )
    for row in report["figures"]:
        print(
            f"{row['threads']:>7} {row['encoding']:<18} {row['bytes_read']:>6.2f} "
            f"{row['milliseconds']:>7.1f} {row['ratio']:>13.2f} {row['read_share']:>14.0%}"
        )
    verdict = "reached" if report["reached"] else "MISSED"
    measured = ", ".join(f"{ratio:.2f}" for ratio in report["ratios"])
    print(
        f"target: stored bf16 <= {RATIO:g} of fp32 rows, measured {measured} (one, two threads): "
        f"{verdict}"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
