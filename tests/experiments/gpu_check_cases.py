"""Cases for Triton's interpreter: checks of a card whose merges it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.gpu_check import arenas, bits, combine
from experiments.gpu_check.check import Machine
from mergesearch.merging.kernels import products_spans, span_dispatch

#: As on a card, but in main memory, where the interpreter runs kernels.
MACHINE = Machine("cpu", Path(), scale=1e-9, kernel="triton")


@contextmanager
def by_triton() -> Iterator[None]:
    """Let tensors in main memory be merged by Triton; arrays stay numba's."""
    before = span_dispatch.runs_on_triton

    def is_tensor(memory: Any) -> bool:
        return not isinstance(memory, np.ndarray)

    span_dispatch.runs_on_triton = is_tensor
    products_spans.runs_on_triton = is_tensor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        span_dispatch.runs_on_triton = before
        products_spans.runs_on_triton = before  # type: ignore[attr-defined]


def _bits(name: str) -> None:
    rows = arenas.ENCODINGS[name]
    with by_triton():
        figures = list(bits._one(MACHINE, name, rows))
    assert [figure.passed for figure in figures] == [True, True], figures


def _launches(name: str) -> None:
    """The number that is reported is the number of kernels that were started."""
    from mergesearch.merging.kernels import triton_combine, triton_factors

    planned, _ = arenas.planned_llama(1, 64, arenas.ENCODINGS[name], 2)
    field = arenas.tensor_field(planned)
    started = []
    kept = [(module, module._launch) for module in (triton_combine, triton_factors)]
    for module, _launch in kept:
        module._launch = lambda *arguments: started.append(arguments)  # type: ignore[attr-defined]
    try:
        with by_triton():
            arena = arenas.Arena.random(planned, "cpu")
            out = arena.memory.new_zeros(planned.size).bfloat16()
            assert arena.merge(field, "delta", out, kernel="triton") == "triton"
    finally:
        for module, launch in kept:
            module._launch = launch  # type: ignore[attr-defined]
    assert combine.launch_count(planned, field) == len(started)


CASES: dict[str, Callable[[], None]] = {
    **{f"bits of {name}": lambda n=name: _bits(n) for name in arenas.ENCODINGS},  # type: ignore[misc]
    **{f"launches of {name}": lambda n=name: _launches(n) for name in ("int8", "factors")},  # type: ignore[misc]
}
