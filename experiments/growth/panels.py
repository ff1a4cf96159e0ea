"""Plots of experiment 25: which cost against which size, with the exponent that is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.growth.plots import Line, Panel

Rows = Sequence[Mapping[str, Any]]


def panels(kept: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """File name -> panels, of the parts that are kept."""
    makers: Mapping[str, tuple[Sequence[str], Callable[..., list[Panel]]]] = {
        "merges.svg": (("merges", "sparse"), merges),
        "memory.svg": (("sparse",), memory),
        "driver.svg": (("driver",), driver),
        "workers.svg": (("workers", "cluster"), workers),
    }
    return {
        name: make(*(kept[part] for part in parts))
        for name, (parts, make) in makers.items()
        if all(part in kept for part in parts)
    }


def of(rows: Rows, key: str) -> list[float]:
    """A column of rows."""
    return [row[key] for row in rows]


def merges(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> list[Panel]:
    """Time of merges."""
    sizes, seconds = zip(*dense["parameters"], strict=True)
    holes = sparse["parameters"]
    moved = [k + 2 for k in dense["experts"]]
    by_size = [
        Line("fp32 rows, K = 4", sizes, seconds, 1),
        Line("bf16 holes, K = 1", of(holes, "parameters"), of(holes, "merge_seconds"), 1),
    ]
    kinds = {"fp32": "fp32 rows", "bf16": "bf16 rows", "apart": "bf16 rows, pages apart"}
    by_experts = [Line(name, moved, dense[kind], 1) for kind, name in kinds.items()]
    millions = round(dense["size"] / 1e6)
    return [
        Panel("Merge, by parameters", "parameters", "CPU seconds", by_size),
        Panel(f"Merge of {millions}M, by experts K", "K + 2", "CPU seconds", by_experts),
    ]


def memory(sparse: Mapping[str, Any]) -> list[Panel]:
    """Memory of a worker."""
    holes = sparse["parameters"]
    by_size = [
        Line("merged weights", of(holes, "parameters"), of(holes, "merged_mb"), 1),
        Line("arena, a mapped file", of(holes, "parameters"), of(holes, "arena_mb"), 1),
    ]
    rows = sparse["experts"]
    terms = [k + 1 for k in of(rows, "experts")]
    by_experts = [
        Line("merged weights", terms, of(rows, "merged_mb")),
        Line("arena, a mapped file", terms, of(rows, "arena_mb"), 1),
    ]
    millions = round(rows[0]["parameters"] / 1e6)
    return [
        Panel("Worker, by parameters, K = 1", "parameters", "MB", by_size),
        Panel(f"Worker, {millions}M parameters, by experts K", "K + 1", "MB", by_experts),
    ]


def driver(figures: Mapping[str, Any]) -> list[Panel]:
    """Time and memory of the driver."""
    by_dimensions = [
        Line(strategy, of(rows, "dimensions"), of(rows, "milliseconds"))
        for strategy, rows in figures["dimensions"].items()
    ]
    rows = figures["trials"]
    many = rows[1:]
    trials = of(many, "trials")
    each = [
        Line("CPU, ms", of(rows, "trials"), of(rows, "milliseconds")),
        Line("memory, kB", trials, of(many, "memory")),
    ]
    whole = [
        Line("opening", trials, of(many, "opening"), 1),
        Line("winner and report", trials, of(many, "ending"), 1),
    ]
    return [
        Panel("A trial in the driver, by dimensions", "dimensions", "CPU ms", by_dimensions),
        Panel("A trial in the driver, by trials", "trials", "ms, kB", each),
        Panel("A record, by trials", "trials", "CPU seconds", whole),
    ]


def workers(real: Mapping[str, Any], cluster: Mapping[str, Any]) -> list[Panel]:
    """What the driver takes for workers, real and simulated."""
    rows = real["rows"]
    counts = of(rows, "workers")
    gpus = of(cluster["rows"], "gpus")
    each = [
        Line("Ray actors", counts, of(rows, "milliseconds")),
        Line("simulated GPUs", gpus, of(cluster["rows"], "milliseconds")),
    ]
    share = [
        Line("Ray actors that sleep 5 s", counts, of(rows, "driver"), 1),
        Line("simulated GPUs, 60 s", gpus, of(cluster["rows"], "driver"), 1),
    ]
    return [
        Panel("A trial in the driver, by workers", "workers", "CPU ms", each),
        Panel("Load of the driver, by workers", "workers", "share of a core", share),
    ]
