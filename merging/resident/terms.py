"""What a merge is a weighted sum of: base, rows and factors, in main memory or on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.resident.packing import Packing, StoredFactors
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array
    from mergesearch.merging.resident.arena import Arenas


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of a merge, wherever they lie.

    Attributes:
        packing: Positions in the arrays.
        form: How base and rows combine.
        base: ``(size,)``.
        rows: ``(K, row)``.
        factors: Rows of tensors that are kept as factors.
        angles: For ``slerp``: the angle between base and row over the flat index.
    """

    packing: Packing
    form: Form
    base: Array
    rows: Array
    factors: tuple[StoredFactors, ...] = ()
    angles: Field | None = None

    @classmethod
    def of(cls, arenas: Arenas) -> Terms:
        """The terms of arenas in main memory."""
        return cls(
            arenas.packing, arenas.form, arenas.base, arenas.basis, arenas.factors, arenas.angles
        )

    @property
    def size(self) -> int:
        """Length of the flat index."""
        return self.packing.layout.size


def on_device(terms: Terms, device: str) -> Terms:
    """The terms as torch tensors on a device; on ``cpu`` they share the memory of the arrays."""
    from mergesearch.merging.kernels.torch_kernel import as_tensor

    factors = tuple(
        replace(
            stored,
            left=as_tensor(stored.left).to(device),
            right=as_tensor(stored.right).to(device),
        )
        for stored in terms.factors
    )
    return replace(
        terms,
        base=as_tensor(terms.base).to(device),
        rows=as_tensor(terms.rows).to(device),
        factors=factors,
    )
