"""Bytes that base, rows and merged weights take on a card, from the headers of checkpoints alone.

Nothing here reads a weight. What an arena keeps is checked bit for bit when it is written, and rows
that turn out not to be what their operator declares are then kept in fp32; the sizes here are those
of rows that are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.family.aligned import stored_behind
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.kernels.lowrank import matrix_shape
from mergesearch.merging.kernels.spans import ITEMSIZE, ROW_BITS, RowsSetting
from mergesearch.merging.operators.base import Operator, kept_form
from mergesearch.merging.resident.factor_choice import worth_keeping
from mergesearch.merging.tensors.layout import Layout, TensorSpec
from mergesearch.merging.tensors.source import Options

#: Rows that are kept as low-rank factors, which is no encoding of its own.
FACTORS = "factors"
#: Encodings and forms whose rows keep the bits of fp32 rows.
EXACT = frozenset({"stored", "masked", "packed", "dense", FACTORS})
#: Operators whose rows may be kept as factors, where every expert is an adapter of the base.
_WITH_FACTORS = frozenset({"task_arithmetic", "lora_sparse"})
#: Operators that interpolate experts: their rows are no changes, which int8 numbers are for.
INTERPOLATING = frozenset({"average", "layer_swap", "slerp"})
#: Tensors of single experts of a mixture, which transformers keeps fused in parameters of its own.
_FUSED = re.compile(r"\.experts\.\d+\.")
#: Elements that blocked torch merges at a time on a card: ``ACCELERATOR_BLOCK`` of its kernel.
_BLOCK = 1 << 22
_LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class TensorBytes:
    """Bytes that one tensor takes.

    Attributes:
        name: Of the tensor.
        base: Of the base, as stored.
        rows: Of all K rows.
        encoding: In which they are kept.
        merged: Of the merged weights, in the model's dtype.
        fused: Of the model's own parameters, where they are no views into the merged weights.
    """

    name: str
    base: int
    rows: int
    encoding: str
    merged: int
    fused: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.rows + self.merged + self.fused


@dataclass(frozen=True)
class WeightBytes:
    """Bytes that the weights of a study take.

    Attributes:
        tensors: Every tensor, in the order of the flat index.
        itemsize: Bytes of a merged number.
    """

    tensors: tuple[TensorBytes, ...]
    itemsize: int

    @cached_property
    def base(self) -> int:
        """Bytes of the base."""
        return sum(tensor.base for tensor in self.tensors)

    @cached_property
    def rows(self) -> int:
        """Bytes of all rows."""
        return sum(tensor.rows for tensor in self.tensors)

    @cached_property
    def merged(self) -> int:
        """Bytes of one merged model."""
        return sum(tensor.merged for tensor in self.tensors)

    @cached_property
    def fused(self) -> int:
        """Bytes of parameters that are copied from the merged weights."""
        return sum(tensor.fused for tensor in self.tensors)

    @property
    def by_encoding(self) -> dict[str, int]:
        """Encoding -> bytes of the rows that are kept in it, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.encoding] += tensor.rows
        return {name: size for name, size in sizes.most_common() if size}

    @property
    def is_exact(self) -> bool:
        """Whether every row keeps the bits of fp32."""
        return self.by_encoding.keys() <= EXACT


def weight_bytes(
    family: ModelFamily, operator: Operator, options: Options, setting: RowsSetting = "auto"
) -> WeightBytes:
    """The bytes that base, rows and merged weights of a study take.

    Args:
        family: Base and experts; only headers are read.
        operator: The study's.
        options: Its complete hyperparameters.
        setting: How the study has rows kept.
    """
    encoding = kept_form(operator, options) if setting == "auto" else setting
    density = operator.density(options)
    directions = operator.directions(len(family.experts), options)
    specs = family.layout.tensors
    itemsize = max(ITEMSIZE[spec.dtype] for spec in specs)
    wide = any(spec.dtype == "float64" for spec in specs)
    return WeightBytes(
        tuple(
            TensorBytes(
                spec.name,
                spec.size * ITEMSIZE[spec.dtype],
                *_rows(family, operator, (encoding, density), spec, directions, wide),
                spec.size * itemsize,
                spec.size * itemsize if _FUSED.search(spec.name) else 0,
            )
            for spec in specs
        ),
        itemsize,
    )


def _rows(
    family: ModelFamily,
    operator: Operator,
    form: tuple[str, float],
    spec: TensorSpec,
    directions: int,
    wide: bool,
) -> tuple[int, str]:
    """Bytes of all rows of a tensor, and the encoding of the first.

    ``form`` is the planned encoding, and the share of elements that masked rows keep.
    """
    rank = _kept_rank(family, operator, spec, directions)
    if rank is not None:
        return rank * sum(matrix_shape(spec.shape)) * (8 if wide else 4), FACTORS
    kept = [
        _row_bits(*form, operator, dtype, wide) for dtype in _row_dtypes(family, spec, directions)
    ]
    return sum(math.ceil(spec.size * bits / 8) for bits, _ in kept), kept[0][1]


def _row_bits(
    encoding: str, density: float, operator: Operator, dtype: str, wide: bool
) -> tuple[float, str]:
    """Bits of an element of a row of an expert of this dtype, and the encoding that it gets."""
    if wide and encoding != "bf16":
        return 64.0, "dense"
    if encoding == "int8" and operator.name in INTERPOLATING:
        return 32.0, "dense"
    if encoding in EXACT and encoding != "packed" and ITEMSIZE[dtype] > 2:
        return 32.0, "dense"  # an expert in fp32 takes no less room than its row
    return ROW_BITS[encoding](dtype, density), encoding


def _row_dtypes(family: ModelFamily, spec: TensorSpec, directions: int) -> list[str]:
    """dtype in which each of the K rows is read; fp32 where rows are not one for each expert."""
    if directions != len(family.experts):
        return ["float32"] * directions
    return [_dtype_read(expert, spec) for expert in family.experts]


def _dtype_read(expert: Checkpoint, spec: TensorSpec) -> str:
    stored = stored_behind(expert, spec.name)
    if isinstance(stored, AdaptedCheckpoint) and spec.name in stored.changes:
        return "float32"  # the sum of base and change, which is not rounded
    info = expert.tensors.get(spec.name)
    return spec.dtype if info is None else info.dtype


def _kept_rank(
    family: ModelFamily, operator: Operator, spec: TensorSpec, directions: int
) -> int | None:
    """The total rank of a tensor's factors; None where its rows are kept whole."""
    stored = [stored_behind(expert, spec.name) for expert in family.experts]
    adapters = [source for source in stored if isinstance(source, AdaptedCheckpoint)]
    whole = len(adapters) < len(family.experts) or spec.name in family.special.postprocessed
    if whole or operator.name not in _WITH_FACTORS or not spec.size:
        return None
    if any(adapter.tensors[spec.name] != family.base.tensors[spec.name] for adapter in adapters):
        return None  # trained whole, or on another base
    changes = [adapter.changes.get(spec.name) for adapter in adapters]
    rank = sum(change[0].down.shape[0] for change in changes if change is not None)
    return rank if worth_keeping(spec.shape, rank, directions) else None


def merge_scratch(layout: Layout, directions: int) -> int:
    """Bytes that a merge needs beside its terms and its result, at most.

    The Triton kernels need none. Blocked torch, which takes their place where Triton is missing,
    has two blocks of sums, and decodes base and K rows of a block while those of the last one are
    still there.
    """
    itemsize = 8 if any(spec.dtype == "float64" for spec in layout.tensors) else 4
    largest = max(spec.size for spec in layout.tensors)
    blocks = 2 * min(_BLOCK, layout.size) + (2 * directions + 3) * min(_BLOCK, largest)
    return itemsize * blocks


def layers(tensors: Sequence[TensorBytes]) -> list[tuple[TensorBytes, ...]]:
    """Tensors in the order of the flat index, cut at layer edges.

    Tensors outside numbered layers are layers of their own.
    """
    return [tuple(group) for _, group in groupby(tensors, key=_layer)]


def _layer(tensor: TensorBytes) -> str:
    found = _LAYER.match(tensor.name)
    return tensor.name if found is None else found[0]


def cut_for_cards(tensors: Sequence[TensorBytes], cards: int) -> list[tuple[TensorBytes, ...]]:
    """Consecutive layers for every card, so that the fullest card holds as little as can be.

    Args:
        tensors: In the order of the flat index.
        cards: Number of stretches; where there are fewer layers, the last ones are empty.
    """
    if cards == 1:
        return [tuple(tensors)]
    units = layers(tensors)
    low = max((_size(unit) for unit in units), default=0)
    high = sum(map(_size, units))
    while low < high:  # the least limit under which the stretches are no more than the cards
        middle = (low + high) // 2
        if len(_filled(units, middle)) <= cards:
            high = middle
        else:
            low = middle + 1
    stretches = _filled(units, low)
    return [*stretches, *[()] * (cards - len(stretches))]


def _filled(units: Sequence[Sequence[TensorBytes]], limit: int) -> list[tuple[TensorBytes, ...]]:
    """Stretches of at most ``limit`` bytes, each as long as can be."""
    stretches: list[list[TensorBytes]] = [[]]
    for unit in units:
        if stretches[-1] and _size(stretches[-1]) + _size(unit) > limit:
            stretches.append([])
        stretches[-1].extend(unit)
    return [tuple(stretch) for stretch in stretches]


def _size(tensors: Sequence[TensorBytes]) -> int:
    return sum(tensor.total for tensor in tensors)
