"""Merges of an 8B-shaped model in every encoding, beside a copy within the card's memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from experiments.gpu_check.arenas import (
    ENCODINGS,
    Arena,
    Plan,
    Rows,
    planned_llama,
    tensor_field,
)
from experiments.gpu_check.check import Figure, Machine
from mergesearch.merging.kernels.triton_blocks import block_rows, launches
from mergesearch.merging.tensors.field import Field

#: Bytes of an arena at full scale, and the share of a card that one may take.
BYTES = 24e9
SHARE = 0.35
DIRECTIONS = 4
ROUNDS = 15

#: Bytes that the copy reads, at most: far more than a card's caches hold.
COPIED = 2 << 30

#: Share of the copy's bandwidth that a merge must reach, and launches that it may take. The share
#: is not judged for factors: 64 terms for each element that is read take longer than reading it.
#: Nor for packed rows: finding a number may take longer than reading it.
BAR = 0.85
LAUNCHES = 10


def run(machine: Machine) -> Sequence[Figure]:
    """A figure for every encoding."""
    return [figure for name, rows in ENCODINGS.items() for figure in _one(machine, name, rows)]


def _one(machine: Machine, name: str, rows: Rows) -> Iterator[Figure]:
    limit = machine.at_most(BYTES, SHARE)
    planned, layers = planned_llama(limit, machine.hidden, rows, DIRECTIONS)
    memory = machine.memory()
    if memory is not None and 2 * planned.bytes > memory[0]:
        yield Figure(name, f"not measured: a layer takes {planned.bytes:,} of {memory[0]:,} bytes")
        return
    arena = Arena.random(planned, machine.device)
    field = tensor_field(planned)
    out = torch.zeros(planned.size, dtype=torch.bfloat16, device=machine.device)
    kernel = arena.merge(field, "delta", out, kernel=machine.kernel, threads=machine.threads)
    merged, copied = _rounds(machine, arena, field, out)
    bytes_moved = planned.bytes + out.nbytes
    rate = bytes_moved / merged
    share = rate / copied
    size = f"{layers} layers of width {machine.hidden}, {bytes_moved / 1e9:.3g} GB"
    yield Figure(
        f"{name}: {size}, {kernel}",
        f"{1e3 * merged:.3g} ms, {rate / 1e9:,.0f} GB/s, {share:.0%} of a copy "
        f"({copied / 1e9:,.0f} GB/s)",
        "" if rows.rank or rows.packed else f"{BAR:.0%}",
        share >= BAR if machine.judges_speed and not (rows.rank or rows.packed) else None,
    )
    if kernel == "triton":
        count = launch_count(planned, field)
        yield Figure(f"{name}: launches", f"{count}", f"{LAUNCHES}", count <= LAUNCHES)


def _rounds(machine: Machine, arena: Arena, field: Field, out: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a merge, and median bytes a second of a copy; they take turns."""
    source = arena.memory[: min(len(arena.memory), COPIED)]
    target = torch.empty_like(source)
    merges = []
    rates = []
    for _ in range(ROUNDS):
        rates.append(2 * len(source) / machine.seconds_of(lambda: target.copy_(source)))
        merges.append(
            machine.seconds_of(
                lambda: arena.merge(
                    field, "delta", out, kernel=machine.kernel, threads=machine.threads
                )
            )
        )
    return statistics.median(merges), statistics.median(rates)


def launch_count(planned: Plan, field: Field) -> int:
    """Launches of the Triton kernels for a merge: those of spans, and those of factors."""
    block = 8 * block_rows(1 + planned.directions)
    of_spans = len(launches(planned.spans, field.boundaries, block)) if planned.spans else 0
    kinds = {(matrix.base.dtype, matrix.columns % 8 == 0) for matrix in planned.matrices}
    return of_spans + len(kinds)
