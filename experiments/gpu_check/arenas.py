"""Arenas of random numbers in every encoding, made where they are merged.

They are made of what the kernels read, spans and matrices, so that nothing but the kernels'
packages is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from mergesearch.merging.kernels.dispatch import term_weights
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.lowrank import combine_factors
from mergesearch.merging.kernels.span_dispatch import SpanKernel, chosen_kernel, combine_spans
from mergesearch.merging.kernels.spans import (
    ITEMSIZE,
    PACK_BLOCK,
    SCALE_BLOCK,
    Column,
    ColumnDtype,
    Span,
)
from mergesearch.merging.kernels.spans_decode import read
from mergesearch.merging.kernels.triton_blocks import Tables
from mergesearch.merging.tensors.field import Field

#: Parts of an arena start at multiples of so many bytes, and tensors at multiples of so many
#: positions, as in the product.
ALIGNED_BYTES = 128
ALIGNED_POSITIONS = 64

#: Numbers of a block of packed ones, a fifth as by default in TIES, and how many masks there are of
#: so many.
KEPT = 13
MASKS = 256

#: Standard deviation of weights, and of their changes.
WEIGHTS = 0.02

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """How all rows of an arena are stored; see :class:`mergesearch.merging.kernels.spans.Column`.

    Attributes:
        dtype: Of their numbers.
        packed: Whether only :data:`KEPT` numbers of every 64 are stored.
        rank: Terms of each direction where rows of matrices are factors, or 0.
    """

    dtype: ColumnDtype
    minus_base: bool = False
    scale: float = 1.0
    masked: bool = False
    shared: bool = False
    packed: bool = False
    rank: int = 0


ENCODINGS: Mapping[str, Rows] = {
    "stored bf16": Rows("bfloat16", minus_base=True),
    "masked": Rows("bfloat16", minus_base=True, scale=1.5, masked=True),
    "masked, shared": Rows("bfloat16", minus_base=True, masked=True, shared=True),
    "packed, shared": Rows("bfloat16", minus_base=True, masked=True, shared=True, packed=True),
    "dense fp32": Rows("float32"),
    "bf16": Rows("bfloat16"),
    "int8": Rows("int8"),
    "factors": Rows("float32", rank=16),
}


@dataclass(frozen=True)
class Factored:
    """A matrix whose rows are factors; the fields are those of the Triton kernel's ``Matrix``."""

    start: int
    rows: int
    columns: int
    base: Column
    left: int
    right: int
    owner: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of its elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Part:
    """Bytes of an arena that are filled alike.

    ``kind`` is a dtype, ``mask`` or ``scales``; or of packed rows ``blocks``, masks of 64 elements,
    or ``starts``.
    """

    kind: str
    offset: int
    count: int


@dataclass(frozen=True)
class Plan:
    """What lies where in an arena that is still to be made.

    Attributes:
        spans, matrices: What is merged.
        parts: All that has to be filled.
        size: Positions of the flat index.
        bytes: Of the arena.
        directions: Number of rows K.
    """

    spans: tuple[Span, ...]
    matrices: tuple[Factored, ...]
    parts: tuple[Part, ...]
    size: int
    bytes: int
    directions: int


class _Planner:
    """Puts the parts of tensors behind one another."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.bytes = 0
        self.size = 0

    def put(self, kind: str, count: int) -> int:
        """The offset of a new part."""
        offset = self.bytes
        self.parts.append(Part(kind, offset, count))
        width = {"mask": 1, "scales": 4, "blocks": 8, "starts": 4}.get(kind) or ITEMSIZE[kind]
        self.bytes += -(-count * width // ALIGNED_BYTES) * ALIGNED_BYTES
        return offset

    def place(self, count: int) -> int:
        """The first position of a tensor."""
        start = self.size
        self.size += -(-count // ALIGNED_POSITIONS) * ALIGNED_POSITIONS
        return start

    def column(self, rows: Rows, count: int) -> Column:
        """A row of a tensor."""
        if rows.packed:
            return self._packed(rows, -(-count // PACK_BLOCK))
        numbers = self.put(rows.dtype, count)
        mask = self.put("mask", -(-count // 8)) if rows.masked else None
        scales = self.put("scales", -(-count // SCALE_BLOCK)) if rows.dtype == "int8" else None
        return Column(rows.dtype, numbers, rows.minus_base, rows.scale, mask, scales)

    def _packed(self, rows: Rows, blocks: int) -> Column:
        numbers = self.put(rows.dtype, KEPT * blocks)
        mask = self.put("blocks", blocks)
        starts = self.put("starts", blocks)
        form = (rows.dtype, numbers, rows.minus_base, rows.scale, mask, None, starts)
        return Column(*form, count=KEPT * blocks)


def plan(
    shapes: Sequence[Shape], rows: Rows, directions: int, bases: Sequence[ColumnDtype]
) -> Plan:
    """Offsets of tensors whose rows are all stored alike.

    Args:
        shapes: Of the tensors.
        rows: How rows are stored; rows of vectors are never factors.
        directions: Number of rows K.
        bases: dtypes of the base, for one tensor after the other.
    """
    planner = _Planner()
    spans: list[Span] = []
    matrices: list[Factored] = []
    for number, shape in enumerate(shapes):
        count = math.prod(shape)
        start = planner.place(count)
        dtype = bases[number % len(bases)]
        base = Column(dtype, planner.put(dtype, count))
        if rows.rank and len(shape) == 2:
            m, n = shape
            terms = rows.rank * directions
            left = planner.put("float32", m * terms)
            right = planner.put("float32", terms * n)
            owner = tuple(np.repeat(np.arange(directions), rows.rank).tolist())
            matrices.append(Factored(start, m, n, base, left, right, owner))
            continue
        columns = tuple(planner.column(rows, count) for _ in range(directions))
        spans.append(Span(start, start + count, base, columns, rows.shared))
    parts = tuple(planner.parts)
    return Plan(tuple(spans), tuple(matrices), parts, planner.size, planner.bytes, directions)


@dataclass(frozen=True, eq=False)
class Arena:
    """An arena that can be merged.

    Attributes:
        plan: What lies where.
        memory: uint8 ``(bytes,)``.
    """

    plan: Plan
    memory: torch.Tensor

    @classmethod
    def random(cls, planned: Plan, device: str, seed: int = 0) -> Arena:
        """Random numbers, made on the device; what lies between parts is zero."""
        memory = torch.empty(planned.bytes, dtype=torch.uint8, device=device)
        return cls.filled(planned, memory, seed)

    @classmethod
    def filled(cls, planned: Plan, memory: torch.Tensor, seed: int = 0) -> Arena:
        """As :meth:`random`, in memory of its size."""
        generator = torch.Generator(memory.device).manual_seed(seed)
        memory.zero_()
        for part in planned.parts:
            numbers = _filling(part, generator).view(torch.uint8)
            memory[part.offset : part.offset + numbers.numel()].copy_(numbers)
        return cls(planned, memory)

    def to(self, device: str) -> Arena:
        """The same arena elsewhere."""
        return replace(self, memory=self.memory.to(device))

    @cached_property
    def tables(self) -> Tables:
        """What kernels of a card keep between merges."""
        return Tables()

    def factors_of(self, matrix: Factored) -> tuple[torch.Tensor, torch.Tensor]:
        """Left ``(m, R)`` and right ``(R, n)``, as views."""
        terms = len(matrix.owner)
        left = self._floats(matrix.left, matrix.rows * terms).view(matrix.rows, terms)
        right = self._floats(matrix.right, terms * matrix.columns).view(terms, matrix.columns)
        return left, right

    def _floats(self, offset: int, count: int) -> torch.Tensor:
        return self.memory[offset : offset + 4 * count].view(torch.float32)

    def merge(
        self,
        field: Field,
        form: Form,
        out: torch.Tensor,
        *,
        angles: Field | None = None,
        kernel: SpanKernel = "auto",
        threads: int = 1,
    ) -> SpanKernel:
        """Merge spans and matrices into ``out`` ``(size,)``; returns the kernel that did it."""
        chosen = chosen_kernel(self.memory, out, False, kernel)
        options = {"angles": angles, "kernel": kernel, "threads": threads}
        spans = self.plan.spans
        combine_spans(self.memory, spans, field, form, out, tables=self.tables, **options)  # type: ignore[arg-type]
        if chosen == "triton" and self.plan.matrices:
            self._merge_by_triton(field, out)
        else:
            for matrix in self.plan.matrices:
                self._merge_one(matrix, field, out, threads)
        return chosen

    def _merge_by_triton(self, field: Field, out: torch.Tensor) -> None:
        from mergesearch.merging.kernels.triton_factors import Matrix, combine

        matrices = [Matrix(**vars(matrix)) for matrix in self.plan.matrices]
        weights = term_weights(field, "delta")[1:].astype(np.float32)
        combine(self.memory, matrices, weights, field.boundaries, out, tables=self.tables)

    def _merge_one(self, matrix: Factored, field: Field, out: torch.Tensor, threads: int) -> None:
        start = matrix.start
        stop = start + matrix.size
        base = read(self.memory, [Span(start, stop, matrix.base, ())], start, stop)[0]
        left, right = self.factors_of(matrix)
        part = field.restrict(start, stop)
        combine_factors(base, left, right, matrix.owner, part, out[start:stop], threads=threads)


def _filling(part: Part, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if part.kind == "mask":
        return torch.randint(256, (part.count,), dtype=torch.uint8, device=device,
                             generator=generator)  # fmt: skip
    if part.kind == "blocks":
        places = torch.rand(MASKS, PACK_BLOCK, device=device, generator=generator).argsort(dim=1)
        masks = (1 << places[:, :KEPT]).sum(dim=1)
        chosen = torch.randint(MASKS, (part.count,), device=device, generator=generator)
        return masks[chosen]
    if part.kind == "starts":
        return torch.arange(part.count, dtype=torch.int32, device=device) * KEPT
    if part.kind == "int8":
        return torch.randint(-127, 128, (part.count,), dtype=torch.int8, device=device,
                             generator=generator)  # fmt: skip
    numbers = torch.randn(part.count, device=device, generator=generator)
    if part.kind == "scales":
        return numbers.abs_().mul_(1e-3)
    return numbers.mul_(WEIGHTS).to(getattr(torch, part.kind))


def llama_shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, Shape]:
    """Names and shapes of a Llama with the proportions of the 8B model.

    Grouped heads: keys and values are a quarter as wide; the MLP is 3.5 times as wide.
    """
    inner = hidden * 7 // 2
    narrow = hidden // 4
    block: dict[str, Shape] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def planned_llama(limit: int, hidden: int, rows: Rows, directions: int) -> tuple[Plan, int]:
    """An arena of at most ``limit`` bytes, with as many layers as fit; and their number.

    At least one layer, at most the 32 of the 8B model.
    """
    for layers in range(32, 0, -1):
        shapes = list(llama_shapes(hidden, layers, 2 * hidden).values())
        planned = plan(shapes, rows, directions, ("bfloat16",))
        if planned.bytes <= limit:
            break
    return planned, layers


def tensor_field(planned: Plan, seed: int = 0) -> Field:
    """A coefficient for every direction and tensor, ``(K, tensors)``."""
    of_spans = [span.start for span in planned.spans]
    starts = sorted([*of_spans, *(matrix.start for matrix in planned.matrices)])
    values = np.random.default_rng(seed).uniform(0.1, 0.9, (planned.directions, len(starts)))
    return Field(np.array([*starts, planned.size]), values)
