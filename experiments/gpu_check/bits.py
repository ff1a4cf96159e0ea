"""Merges and gradients on the card against those of the CPU, for everything that kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from experiments.gpu_check.arenas import ENCODINGS, Arena, Rows, Shape, plan
from experiments.gpu_check.check import Figure, Machine
from mergesearch.merging.kernels.forms import FORMS, Form
from mergesearch.merging.kernels.products import factor_products
from mergesearch.merging.kernels.products_spans import span_products
from mergesearch.merging.kernels.spans import ColumnDtype
from mergesearch.merging.kernels.spans_decode import read
from mergesearch.merging.tensors.field import Field

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED: tuple[ColumnDtype, ...] = ("bfloat16", "float32", "float16")
DIRECTIONS = 3

#: Of these rows, every form is merged into every dtype.
EVERY_PAIR = ENCODINGS["stored bf16"]

#: Rows of the largest matrix at full scale.
ROWS = 4000

#: Difference of a gradient, as a share of the sum of the magnitudes that it adds up.
BAR = 1e-6

_Wide = npt.NDArray[np.float64]


def run(machine: Machine) -> Sequence[Figure]:
    """Two figures for every encoding: bits of merges, and gradients."""
    return [figure for name, rows in ENCODINGS.items() for figure in _one(machine, name, rows)]


def _one(machine: Machine, name: str, rows: Rows) -> Iterator[Figure]:
    merges = 0
    numbers = 0
    different = 0
    for form, dtype, mixed in variants(rows):
        arena = arena_of(machine, rows, 1 if form == "slerp" else DIRECTIONS, mixed)
        expected, found = merged_twice(machine, arena, form, dtype)
        merges += 1
        numbers += found.numel()
        different += int((expected != found).sum())
    yield Figure(
        f"{name}: {merges} merges, {numbers:,} numbers",
        f"{different:,} differ from the CPU's",
        "0",
        different == 0,
    )
    error = gradient_error(machine, arena_of(machine, rows, DIRECTIONS, False))
    yield Figure(f"{name}: gradients", f"{error:.1e} off", f"{BAR:.0e}", error <= BAR)


def variants(rows: Rows) -> Iterator[tuple[Form, torch.dtype, bool]]:
    """Form, dtype of the result, and whether bases of all dtypes are merged.

    Every form and every dtype with every encoding; all pairs of the two with
    :data:`EVERY_PAIR` only, as every combination is a kernel that takes a second to compile.
    """
    for dtype in DTYPES:
        yield "delta", dtype, True
    forms: Sequence[str] = () if rows.rank else FORMS[1:]
    dtypes = DTYPES if rows == EVERY_PAIR else (torch.bfloat16,)
    for form in forms:
        for dtype in dtypes:
            yield form, dtype, False  # type: ignore[misc]


def arena_of(machine: Machine, rows: Rows, directions: int, mixed: bool) -> Arena:
    """Matrices and vectors of even and odd sizes, in main memory.

    Args:
        machine: How large.
        rows: How they are stored.
        directions: Their number K.
        mixed: Whether bases have all dtypes; else they are bf16.
    """
    height = max(70, int(ROWS * machine.scale))
    shapes: list[Shape] = [(height, 136), (33, 17), (301,), (1, 40), (2500,)]
    planned = plan(shapes, rows, directions, MIXED if mixed else MIXED[:1])
    return Arena.random(planned, "cpu", seed=directions)


def field_of(arena: Arena) -> Field:
    """Segments that begin anywhere; one of five coefficients is 0."""
    size = arena.plan.size
    generator = np.random.default_rng(1)
    edges = np.unique([0, 100, size // 3, size // 2 + 1, size - 77, size])
    values = generator.uniform(-0.9, 0.9, (arena.plan.directions, len(edges) - 1))
    values[generator.random(values.shape) < 0.2] = 0
    return Field(edges, values)


def merged_twice(
    machine: Machine, arena: Arena, form: Form, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of a merge on the CPU and on the device, both in main memory."""
    field = field_of(arena)
    angles = (
        Field(field.boundaries[[0, 2, -1]], np.array([[0.3, 0.0]])) if form == "slerp" else None
    )
    there = arena.to(machine.device)
    own = torch.zeros(arena.plan.size, dtype=dtype)
    other = torch.zeros(arena.plan.size, dtype=dtype, device=machine.device)
    arena.merge(field, form, own, angles=angles, kernel="numba")
    there.merge(field, form, other, angles=angles, kernel=machine.kernel)
    held = torch.int32 if dtype == torch.float32 else torch.int16
    return own.view(held), other.cpu().view(held)


def gradient_error(machine: Machine, arena: Arena) -> float:
    """The largest error of a gradient on the device, as a share of what it adds up."""
    boundaries = field_of(arena).boundaries
    there = arena.to(machine.device)
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(arena.plan.size, generator=generator)
    errors = [0.0]
    if arena.plan.spans:
        memory = arena.memory.numpy()
        found = span_products(there.memory, there.plan.spans, vector.to(machine.device), boundaries)
        expected = span_products(memory, arena.plan.spans, vector.numpy(), boundaries)
        rows = read(memory, arena.plan.spans, 0, arena.plan.size)[1]
        magnitude = np.add.reduceat(np.abs(rows * vector.numpy()), boundaries[:-1], axis=1)
        errors.append(largest_share(found, expected, magnitude.astype(np.float64)))
    for matrix in arena.plan.matrices:
        part = vector[matrix.start : matrix.start + matrix.size]
        cuts = np.array([0, matrix.size // 3, matrix.size])
        found = _of_factors(part.to(machine.device), *there.factors_of(matrix), matrix.owner, cuts)
        left, right = arena.factors_of(matrix)
        expected = _of_factors(part, left, right, matrix.owner, cuts)
        magnitude = _of_factors(part.abs(), left.abs(), right.abs(), matrix.owner, cuts)
        errors.append(largest_share(found, expected, magnitude))
    return max(errors)


def _of_factors(
    vector: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    owner: Sequence[int],
    cuts: npt.NDArray[np.int64],
) -> _Wide:
    return factor_products(vector, left, right, owner, DIRECTIONS, cuts)


def largest_share(found: _Wide, expected: _Wide, magnitude: _Wide) -> float:
    """The largest difference over the magnitude; differences of what has none count as they are."""
    return float((np.abs(found - expected) / np.where(magnitude > 0, magnitude, 1)).max())
