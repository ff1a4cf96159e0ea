"""Cases for Triton's compiler, without a device: what the kernels become on three generations.

Kernels are called as on a GPU, with a driver that only says which one it is: the arguments, and
what Triton knows of them, are those of a real launch, which is then left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mergesearch.merging.kernels.spans import Column
from tests.merging.kernels import span_reference as reference
from tests.merging.kernels.span_reference import Row, Stretch

#: Compute capabilities: A100, H100 and H200, B200.
DEVICES = (80, 90, 100)


class Driver:
    """Says that there is a device of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


class Compiled:
    """Stands where a kernel stood, compiles what would be launched, and keeps it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.results: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.results.append(self.kernel.warmup(*arguments, grid=grid, **options))

        return launch


def compiled(device: int, module: ModuleType, kernel: str, call: Callable[[], object]) -> list[Any]:
    """What the launches of a kernel become while ``call`` runs."""
    from triton.runtime import driver

    driver.set_active(Driver(device))
    before = getattr(module, kernel)
    stand_in = Compiled(before)
    setattr(module, kernel, stand_in)
    try:
        call()
    finally:
        setattr(module, kernel, before)
    return stand_in.results


def merge(
    device: int,
    base: Any,
    rows: Sequence[Row],
    dtype: str,
    election: str = "",
    shared: bool = False,
) -> Any:
    """The kernel of a merge of one span of these rows."""
    import torch

    from mergesearch.merging.kernels import triton_combine

    stretch = Stretch(5000, base, tuple(rows), shared)
    memory, spans = reference.random_arena(np.random.default_rng(0), [stretch])
    weights = np.ones((len(rows) + 1, 2), np.float32)
    out = torch.empty(5000, dtype=getattr(torch, dtype))
    arena = aligned(memory)
    boundaries = np.array([0, 2000, 5000])
    (result,) = compiled(
        device,
        triton_combine,
        "_merge",
        lambda: triton_combine.combine(arena, spans, weights, boundaries, out, election),
    )
    return result


def aligned(memory: np.ndarray) -> Any:
    """As a tensor that starts where a GPU's would."""
    import torch

    tensor = torch.empty(memory.size, dtype=torch.uint8).copy_(torch.from_numpy(memory))
    assert tensor.data_ptr() % 16 == 0
    return tensor


def check_exact(kernel: Any) -> None:
    """No fused operation and no approximation anywhere, and no flushed denormals."""
    text = kernel.asm["ptx"]
    assert not re.search(r"\bfma\b", text)
    assert not re.search(r"\.(ftz|approx|full)\b", text)
    assert not re.search(r"\b(mul|add|sub|div)\.f(32|64)\b", text)  # these name no rounding
    assert re.search(r"\bmul\.rn\.f", text)
    assert re.search(r"\badd\.rn\.f", text)


def check_machine_code(kernel: Any) -> None:
    """The assembler fuses nothing either; divisions are left out, which consist of fused steps."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([program, file.name], capture_output=True, text=True, check=True)
    assert re.search(r"\bFMUL2?\b", done.stdout)
    assert not re.search(r"\b[FD]FMA2?\b", done.stdout)


def vector_loads(kernel: Any, width: str = "v4") -> int:
    """Number of loads of ``width`` words of 32 bits."""
    return len(re.findall(rf"ld\.global[\w.:]*\.{width}\.b32", kernel.asm["ptx"]))


def vector_stores(kernel: Any) -> int:
    return len(re.findall(r"st\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"]))


def _stored(device: int) -> None:
    """Four experts and base in bf16: a load of 128 bits for each, and a store."""
    kernel = merge(device, "bfloat16", [Row("bfloat16", True)] * 4, "bfloat16")
    check_exact(kernel)
    check_machine_code(kernel)
    assert vector_loads(kernel) == 5
    assert vector_stores(kernel) == 1
    assert kernel.metadata.shared == 0


def _dense(device: int) -> None:
    kernel = merge(device, "float32", [Row("float32")] * 4, "float32")
    check_exact(kernel)
    check_machine_code(kernel)
    assert vector_loads(kernel) == 10
    assert vector_stores(kernel) == 2


def _masked(device: int) -> None:
    rows = [Row("bfloat16", True, 1.5, True)] * 4
    kernel = merge(device, "bfloat16", rows, "bfloat16", shared=True)
    check_exact(kernel)
    assert vector_loads(kernel) == 5
    # One byte of each mask for eight elements, in whole blocks and in others.
    assert len(re.findall(r"ld\.global[\w.:]*\.b8", kernel.asm["ptx"])) == 8
    assert "div.rn.f32" in kernel.asm["ptx"]


def _packed(device: int) -> None:
    """A thread finds the numbers of its eight elements alone: no scan, nothing shared."""
    rows = [Row("bfloat16", True, 1.5, True, True)] * 4
    kernel = merge(device, "bfloat16", rows, "bfloat16")
    check_exact(kernel)
    check_machine_code(kernel)
    assert vector_loads(kernel) == 1  # of the base
    assert vector_stores(kernel) == 1
    # In whole blocks and in others, where the base is read one by one too.
    assert len(re.findall(r"ld\.global[\w.:]*\.b16", kernel.asm["ptx"])) == 8 * (2 * 4 + 1)
    assert not re.search(r"\b(bar|shfl)\b", kernel.asm["ptx"])
    assert kernel.metadata.shared == 0


def _int8(device: int) -> None:
    kernel = merge(device, "float16", [Row("int8")] * 8, "float16")
    check_exact(kernel)
    check_machine_code(kernel)
    assert vector_loads(kernel) == 1
    assert vector_loads(kernel, "v2") == 8


def _election(device: int) -> None:
    for count in (4, 16):
        rows = [Row("bfloat16", True)] * count
        kernel = merge(device, "bfloat16", rows, "bfloat16", "elect_weighted")
        check_exact(kernel)
        assert vector_loads(kernel) == count + 1
        assert "div.rn.f32" in kernel.asm["ptx"]


def _any_form(device: int) -> None:
    """The kernel that reads from a table how terms are stored."""
    import torch

    from mergesearch.merging.kernels import triton_combine

    stretches = [
        Stretch(64 + n, base, (Row(kind), Row("bfloat16", True)))
        for n, (base, kind) in enumerate(
            (base, kind)
            for base in ("float32", "bfloat16", "float16")
            for kind in ("float32", "bfloat16", "float16", "int8")
        )
    ]
    memory, spans = reference.random_arena(np.random.default_rng(0), stretches)  # type: ignore[arg-type]
    arena = aligned(memory)
    boundaries = np.array([0, spans[-1].stop])
    weights = np.ones((3, 1), np.float32)
    out = torch.empty(spans[-1].stop, dtype=torch.bfloat16)
    kernels = compiled(
        device,
        triton_combine,
        "_merge",
        lambda: triton_combine.combine(arena, spans, weights, boundaries, out),
    )
    assert len(kernels) == 10
    for kernel in kernels:
        check_exact(kernel)
    assert vector_loads(kernels[-1]) >= 3


def _factors(device: int) -> None:
    import torch

    from mergesearch.merging.kernels import triton_factors

    left = 128 * 256 * 2
    right = left + 128 * 8 * 4
    matrix = triton_factors.Matrix(
        0, 128, 256, Column("bfloat16", 0), left, right, (0, 0, 0, 0, 1, 1, 1, 1)
    )
    arena = aligned(np.zeros(right + 8 * 256 * 4, np.uint8))
    weights = np.ones((2, 1), np.float32)
    out = torch.empty(128 * 256, dtype=torch.bfloat16)
    boundaries = np.array([0, 128 * 256])
    (kernel,) = compiled(
        device,
        triton_factors,
        "_tile",
        lambda: triton_factors.combine(arena, [matrix], weights, boundaries, out),
    )
    check_exact(kernel)
    check_machine_code(kernel)
    assert vector_loads(kernel) >= 6
    assert vector_stores(kernel) == 4


def _products(device: int) -> None:
    import torch

    from mergesearch.merging.kernels import triton_products

    rows = (Row("bfloat16", True),) * 4
    memory, spans = reference.random_arena(
        np.random.default_rng(0), [Stretch(9000, "bfloat16", rows)]
    )
    arena = aligned(memory)
    vector = torch.empty(9000, dtype=torch.bfloat16)
    boundaries = np.array([0, 9000])

    def call() -> object:
        compiled(device, triton_products, "_added", product)
        return None

    def product() -> object:
        return triton_products.products(arena, spans, vector, boundaries, base=True)

    (kernel,) = compiled(device, triton_products, "_products", call)
    check_exact(kernel)
    assert "atom" not in kernel.asm["ptx"]
    assert "red.global" not in kernel.asm["ptx"]
    assert vector_loads(kernel) == 6


_KINDS = {
    "dense": _dense,
    "masked": _masked,
    "packed": _packed,
    "int8": _int8,
    "election": _election,
    "any form": _any_form,
    "factors": _factors,
    "products": _products,
}

#: What ``make test`` compiles.
QUICK: dict[str, Callable[[], None]] = {
    f"stored, sm_{device}": partial(_stored, device) for device in DEVICES
}

CASES: dict[str, Callable[[], None]] = {
    **QUICK,
    **{
        f"{name}, sm_{device}": partial(case, device)
        for name, case in _KINDS.items()
        for device in DEVICES
    },
}
