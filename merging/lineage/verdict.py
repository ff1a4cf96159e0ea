"""From figures to a verdict: is a merge of these two an average of related weights?

Thresholds lie between what was measured on real pairs (docs/lineage.md): fine-tuned experts keep a
cosine of 0.99 and more, networks of other origin have one of 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mergesearch.merging.lineage.agreement import Agreement
from mergesearch.merging.lineage.products import HeadAgreement
from mergesearch.merging.lineage.relation import UNJUDGED, Kind, TensorAgreement
from mergesearch.merging.lineage.units import MovedUnits

#: Cosine of a role below which an expert is of another origin.
UNRELATED_BELOW = 0.2
#: Cosine of a role below which a merge deserves a warning.
DISTANT_BELOW = 0.6
#: Parameters that a role must have to be judged; noise of the cosine is 0.011 there.
JUDGED_FROM = 8192
#: Compared elements that a single matrix must have to be called unrelated.
APART_FROM = 1024
#: Cosine that the product of a locked head has at least, and how far above that of its elements.
#: Fine-tuning moves products further than elements.
LOCKED_PRODUCT = 0.7
LOCKED_GAP = 0.25
#: Cosine of rows from which only their scale may differ, and the scale that is too far.
SAME_DIRECTION = 0.95
FAR_SCALE = math.log2(1.5)


def judged(roles: Mapping[str, Agreement]) -> dict[str, Agreement]:
    """The roles that an expert is judged by."""
    return {
        role: agreement
        for role, agreement in roles.items()
        if role not in UNJUDGED and agreement.parameters >= JUDGED_FROM and agreement.comparable
    }


def unrelated_matrices(tensors: Sequence[TensorAgreement], below: float) -> list[TensorAgreement]:
    """Single matrices of judged roles whose cosine is below a limit."""
    return [tensor for tensor in _judged_matrices(tensors) if tensor.agreement.cosine < below]


def _judged_matrices(tensors: Sequence[TensorAgreement]) -> list[TensorAgreement]:
    """Single matrices of judged roles of which enough was compared."""
    return [t for t in tensors if t.role not in UNJUDGED and t.compared >= APART_FROM]


def verdict(
    tensors: Sequence[TensorAgreement],
    roles: Mapping[str, Agreement],
    heads: Sequence[HeadAgreement],
    moved: Sequence[MovedUnits],
) -> tuple[Kind, str]:
    """The kind of a lineage, and what was found as a clause."""
    by_role = judged(roles)
    if not by_role:
        return "unknown", "too few weights to judge"
    if moved:
        return "permuted", _moved_clause(moved)
    locked = [head for head in heads if is_locked(head)]
    if locked:
        return "locked", _locked_clause(locked)
    scaled = _rescaled_heads(heads) or _rescaled_matrices(tensors)
    if scaled:
        return "rescaled", scaled
    low = {role: one for role, one in by_role.items() if one.cosine < UNRELATED_BELOW}
    if low:
        return "unrelated", f"cosines of {cosines(low)}"
    far = {role: one for role, one in by_role.items() if one.cosine < DISTANT_BELOW}
    if far:
        return "distant", f"cosines of {cosines(far)}"
    if all(one.change == 0 for one in roles.values()):
        return "identical", "no difference in the samples"
    return "fine-tuned", ""


def is_locked(head: HeadAgreement) -> bool:
    """Whether a head's product is the base's while its elements are not."""
    product = head.product.cosine
    return product > LOCKED_PRODUCT and product > head.elements + LOCKED_GAP


def cosines(roles: Mapping[str, Agreement]) -> str:
    """Roles and their cosines for a sentence."""
    return ", ".join(f"{role} {one.cosine:.3f}" for role, one in roles.items())


def _moved_clause(moved: Sequence[MovedUnits]) -> str:
    first = moved[0]
    more = f" (and of {len(moved) - 1} more kinds of matrices)" if len(moved) > 1 else ""
    return (
        f"{first.moved} of {first.sampled} sampled units of {first.name}{more} in other places, "
        f"with cosine {first.cosine:.3f} once they are matched"
    )


def _locked_clause(locked: Sequence[HeadAgreement]) -> str:
    one = locked[0]
    clause = (
        f"{one.pair} products of cosine {one.product.cosine:.3f} from elements of cosine "
        f"{one.elements:.3f} ({one.where.rstrip('.')}, head {one.head})"
    )
    if one.turned is not None and one.turned.cosine < LOCKED_PRODUCT:
        clause += ", though not under rotary positions, so that the function differs too"
    return clause


def _rescaled_heads(heads: Sequence[HeadAgreement]) -> str:
    """The first head whose two matrices have factors that cancel."""
    for head in heads:
        first = head.first.octaves
        second = head.second.octaves
        same = head.elements > SAME_DIRECTION and abs(head.product.octaves) < FAR_SCALE
        if same and min(abs(first), abs(second)) > FAR_SCALE:
            one, other = head.pair.split("-")
            return (
                f"{one} times {2**first:.3g} and {other} times {2**second:.3g} "
                f"({head.where.rstrip('.')}, head {head.head})"
            )
    return ""


def _rescaled_matrices(tensors: Sequence[TensorAgreement]) -> str:
    """The first kind of matrices whose rows keep their direction on another scale."""
    kinds: dict[str, list[TensorAgreement]] = {}
    for tensor in _judged_matrices(tensors):
        kinds.setdefault(tensor.kind, []).append(tensor)
    for kind, members in kinds.items():
        cosine = float(np.median([tensor.row_cosine for tensor in members]))
        octaves = float(np.median([tensor.row_octaves for tensor in members]))
        if cosine > SAME_DIRECTION and octaves > FAR_SCALE:
            return (
                f"rows of {kind} in the base's direction with scales off by a factor of "
                f"{2**octaves:.3g}"
            )
    return ""
