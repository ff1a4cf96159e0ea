"""The flat index: where each merged tensor lies in an arena.

Every arena of a merge (base, each basis direction, merged) has the same layout: tensors in natural
order of their names, each starting at a multiple of 64 elements. Fields, groups and split points
all speak of positions in this flat index. Built from headers alone; no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mergesearch.merging.errors import CheckpointError

#: Tensors start at multiples of this many elements (256 bytes in fp32: a cache line and a vector
#: register).
ALIGNMENT = 64

#: Dtypes that are merged; anything else (integers, booleans) is copied from the base.
FLOATING = frozenset({"float64", "float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class TensorSpec:
    """One merged tensor and its position in the flat index.

    Name in the checkpoint, shape, dtype in the base, and first position.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element in the flat index (padding excluded)."""
        return self.start + self.size


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which ``layers.2`` comes before ``layers.10``."""
    return tuple(
        (0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)
    )


@dataclass(frozen=True)
class Layout:
    """Positions of all merged tensors in a flat index of ``size`` elements, padding included."""

    tensors: tuple[TensorSpec, ...]
    size: int

    @classmethod
    def build(cls, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Layout:
        """Lay out ``name -> (shape, dtype)`` in natural order of the names.

        Raises:
            CheckpointError: If a dtype is not floating point, or there is no tensor.
        """
        if not tensors:
            raise CheckpointError(
                "expected at least one floating-point tensor to merge, received none"
            )
        specs = []
        start = 0
        for name in sorted(tensors, key=lambda name: (natural_key(name), name)):
            shape, dtype = tensors[name]
            if dtype not in FLOATING:
                raise CheckpointError(
                    f"tensor {name!r}: expected one of {sorted(FLOATING)}, received {dtype}"
                )
            spec = TensorSpec(name, tuple(shape), dtype, start)
            specs.append(spec)
            start = -(-spec.stop // ALIGNMENT) * ALIGNMENT
        return cls(tuple(specs), start)

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """Tensors by name."""
        return {spec.name: spec for spec in self.tensors}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of the flat index."""
        return tuple(spec.name for spec in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of merged parameters, padding excluded."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def digest(self) -> str:
        """Short hash of names, shapes, dtypes and positions."""
        text = json.dumps([[s.name, list(s.shape), s.dtype, s.start] for s in self.tensors])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def segment_starts(self) -> Iterable[int]:
        """Start of every tensor: the finest boundaries that do not cut a tensor."""
        return (spec.start for spec in self.tensors)
