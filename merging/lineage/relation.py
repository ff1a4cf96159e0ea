"""What a lineage is: how an expert relates to its base, and the figures that say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mergesearch.merging.family.messages import kind_of
from mergesearch.merging.lineage.agreement import Agreement
from mergesearch.merging.lineage.products import HeadAgreement
from mergesearch.merging.lineage.units import MovedUnits

Kind = Literal[
    "identical",
    "fine-tuned",
    "distant",
    "unrelated",
    "permuted",
    "locked",
    "rescaled",
    "unknown",
]
#: Kinds whose merges are noise.
REFUSED: frozenset[Kind] = frozenset({"unrelated", "permuted", "locked", "rescaled"})
#: Roles by which no lineage is judged: heads are often trained anew, and vectors (norms, biases)
#: are alike in all networks.
UNJUDGED = frozenset({"head", "norm", "vectors"})


@dataclass(frozen=True)
class TensorAgreement:
    """How one tensor agrees with the base's.

    Attributes:
        name: Its name.
        role: Its role; ``vectors`` for tensors of one dimension.
        agreement: Over sampled elements, extrapolated to all.
        compared: Elements that were compared.
        row_cosine: Median cosine of its rows.
        row_octaves: Median size of the scales of its rows, as binary logarithms.
        finite: Whether all sampled elements of the expert are finite.
    """

    name: str
    role: str
    agreement: Agreement
    compared: int
    row_cosine: float
    row_octaves: float
    finite: bool = True

    @property
    def kind(self) -> str:
        """Its name without numbers, which it shares with its like in other blocks."""
        return kind_of(self.name)


@dataclass(frozen=True)
class Lineage:
    """How an expert relates to its base.

    Attributes:
        base: Name and path of the base.
        expert: Name and path of the expert.
        kind: The verdict.
        finding: What was found, as a clause; empty where there is nothing to say.
        roles: Role -> agreement of its sampled elements.
        heads: Agreement of heads and of their products.
        moved: Units that stand in other places.
        apart: Single matrices that are unrelated to the base's.
        tensors: Tensors that were compared.
        size: Bytes that were read of both.
        broken: Tensors of the expert with NaN or infinity among their samples.
        recovered: Of a locked or re-aligned expert: share of the distance between its heads and
            the base's that re-alignment removes; else None.
        aligned: How the expert is brought into the base's coordinates before a merge, if it is.
    """

    base: tuple[str, str]
    expert: tuple[str, str]
    kind: Kind
    finding: str
    roles: Mapping[str, Agreement]
    heads: tuple[HeadAgreement, ...]
    moved: tuple[MovedUnits, ...]
    apart: tuple[str, ...]
    tensors: int
    size: int
    broken: tuple[str, ...] = ()
    recovered: float | None = None
    aligned: str = ""

    @property
    def refused(self) -> bool:
        """Whether a merge of the two is refused unless it is asked for."""
        return self.kind in REFUSED and not self.aligned


def role_agreements(tensors: Iterable[TensorAgreement]) -> dict[str, Agreement]:
    """Sums over the tensors of each role, in the order of their appearance."""
    roles: dict[str, Agreement] = {}
    for tensor in tensors:
        roles[tensor.role] = roles.get(tensor.role, Agreement()) + tensor.agreement
    return roles
