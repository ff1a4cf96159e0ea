"""One tensor on its way into an arena: its rows are prepared, encoded, and written in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from mergesearch.merging.checkpoints.safetensors_writer import write_at
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.resident.encodings.base import EncodedRow, Encoding, TensorRows
from mergesearch.merging.resident.encodings.packing import StoredTensor, TensorParts
from mergesearch.merging.resident.encodings.table import encode
from mergesearch.merging.resident.factor_choice import low_rank_factors
from mergesearch.merging.tensors.layout import TensorSpec
from mergesearch.merging.tensors.source import Factors

if TYPE_CHECKING:
    from mergesearch.merging.kernels.spans import ColumnDtype
    from mergesearch.merging.operators import Basis


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A tensor as an arena keeps it.

    Attributes:
        stored: How.
        base: As its checkpoint stores it.
        rows: Its rows, none if there are factors.
        factors: In the accumulation dtype, or None.
    """

    stored: StoredTensor
    base: torch.Tensor
    rows: tuple[EncodedRow, ...] = ()
    factors: Factors | None = None


def encode_tensor(
    family: ModelFamily, basis: Basis, spec: TensorSpec, encoding: Encoding, dtype: str
) -> EncodedTensor:
    """Prepare the rows of one tensor and bring them into their encoding.

    Args:
        family: Base and experts.
        basis: Of the operator.
        spec: The tensor.
        encoding: What is planned; rows that it cannot express are kept dense.
        dtype: Of every sum.
    """
    base = family.base.read(spec.name).detach().cpu()
    origin = cast("ColumnDtype", str(base.dtype).removeprefix("torch."))
    factors = low_rank_factors(basis, spec, family.special.postprocessed)
    if factors is not None:
        wide = getattr(torch, dtype)
        kept = Factors(factors.left.to(wide), factors.right.to(wide), factors.owner)
        ranks = tuple(kept.owner.count(k) for k in range(basis.directions))
        return EncodedTensor(StoredTensor(origin, ranks=ranks), base, factors=kept)
    rows = [row.detach().cpu().to(getattr(torch, dtype)) for row in basis.rows(spec.name)]
    experts = []
    if encoding.name in ("stored", "masked", "packed"):
        experts = [expert.read(spec.name).detach().cpu() for expert in family.experts]
    relative = basis.form not in ("interpolation", "slerp")
    encoded = encode(encoding, TensorRows(base, experts, rows, relative))
    columns = tuple(row.column for row in encoded.rows)
    return EncodedTensor(StoredTensor(origin, columns, encoded.shared), base, encoded.rows)


def write_parts(file: int, tensor: EncodedTensor, parts: TensorParts) -> None:
    """Write the parts of a tensor at their offsets."""
    _write(file, parts.base, tensor.base)
    for row, numbers, mask, scales, starts in zip(
        tensor.rows, parts.numbers, parts.masks, parts.scales, parts.starts, strict=True
    ):
        _write(file, numbers, row.numbers)
        _write(file, mask, row.mask)
        _write(file, scales, row.scales)
        _write(file, starts, row.starts)
    if tensor.factors is not None and parts.factors is not None:
        _write(file, parts.factors[0], tensor.factors.left)
        _write(file, parts.factors[1], tensor.factors.right)


def _write(file: int, offset: int | None, tensor: torch.Tensor | None) -> None:
    if offset is None or tensor is None or tensor.numel() == 0:
        return
    write_at(file, offset, _bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
