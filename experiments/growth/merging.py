"""Time of a merge by parameters and by experts, on random rows and one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from mergesearch.merging import Field
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.span_dispatch import combine_spans
from mergesearch.merging.kernels.spans import Column, Span

#: Rounds in which everything runs once, after one to warm up.
ROUNDS = 5
#: Parameters of the merges by experts: rows of whole pages, of 40 and 80 MB, beyond all caches.
SIZE = 20_000_000 // 2048 * 2048
#: Bytes by which each row begins later in its page where rows lie apart.
APART = 192


def merge_seconds(parameters: int, experts: int) -> float:
    """CPU seconds of a merge of fp32 rows, the best of some."""
    base = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    rows = [base + np.float32(k) for k in range(experts)]
    field = _field(parameters, experts)
    out = np.zeros_like(base)
    run = {"merge": lambda: combine(base, rows, field, "delta", out, threads=1)}
    return _best(run)["merge"]


def by_experts(counts: tuple[int, ...]) -> dict[str, list[float]]:
    """CPU seconds of merges of fp32 rows and of stored bf16 experts; all take turns.

    Stored experts begin at the same place of their pages, as matrices do whose bytes fill pages, or
    each ``APART`` bytes further.
    """
    most = max(counts)
    base = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)
    rows = [base + np.float32(k) for k in range(most)]
    out = np.zeros_like(base)
    stored = [torch.from_numpy(row).bfloat16() for row in (base, *rows)]
    memory = np.zeros((most + 1) * (2 * SIZE + APART), np.uint8)
    numbers = torch.stack(stored).view(torch.uint8).numpy().reshape(-1)
    memory[: numbers.size] = numbers
    narrow = torch.zeros(SIZE, dtype=torch.bfloat16)

    def plain(count: int) -> Callable[[], None]:
        field = _field(SIZE, count)
        return lambda: combine(base, rows[:count], field, "delta", out, threads=1)

    def resident(count: int, apart: int = 0) -> Callable[[], None]:
        field = _field(SIZE, count)
        pitch = 2 * SIZE + apart
        first, *others = (Column("bfloat16", pitch * i, minus_base=i > 0) for i in range(count + 1))
        spans = [Span(0, SIZE, first, tuple(others))]
        return lambda: combine_spans(memory, spans, field, "delta", narrow, threads=1)

    ways = {f"fp32 {count}": plain(count) for count in counts}
    ways |= {f"bf16 {count}": resident(count) for count in counts}
    ways |= {f"apart {count}": resident(count, APART) for count in counts}
    best = _best(ways)
    kinds = ("fp32", "bf16", "apart")
    return {kind: [best[f"{kind} {count}"] for count in counts] for kind in kinds}


def _field(size: int, experts: int) -> Field:
    return Field(np.array([0, size]), np.full((experts, 1), 0.3))


def _best(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Least CPU seconds of each over the rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                best[name] = min(best[name], time.process_time() - start)
    return best
