"""Compares an expert with its base from samples: a bounded number of bytes of each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergesearch.merging.attention.heads import Attention, find_attentions
from mergesearch.merging.attention.realigning import mappable, recovered
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE
from mergesearch.merging.family.aligned import before_realignment
from mergesearch.merging.family.messages import kind_of
from mergesearch.merging.lineage.agreement import Agreement, row_agreement
from mergesearch.merging.lineage.products import HeadAgreement, HeadReader
from mergesearch.merging.lineage.relation import (
    Kind,
    Lineage,
    TensorAgreement,
    role_agreements,
)
from mergesearch.merging.lineage.rows import (
    RowReader,
    generator_for,
    matrix_view,
    sampled_rows,
)
from mergesearch.merging.lineage.units import MovedUnits, moved_units
from mergesearch.merging.lineage.verdict import (
    DISTANT_BELOW,
    UNRELATED_BELOW,
    unrelated_matrices,
    verdict,
)
from mergesearch.merging.tensors.roles import roles_of

#: Tensors that are compared at most, spread over the kinds of a model.
MOST_TENSORS = 400
#: Bytes that are sampled of each tensor, about.
TENSOR_BYTES = 32 << 10
#: Bytes of heads that are compared in all, beyond the fewest attentions.
ATTENTION_BYTES = 4 << 20
#: Attentions whose products are compared at least and at most.
ATTENTIONS = (2, 8)
#: Attentions that are read whole to tell what re-alignment recovers of a locked expert.
REALIGNED = 2
#: Kinds of matrices whose units are looked for, the rows and bytes that signatures take, and the
#: bytes up to which a matrix is read whole to match its rows too.
MOST_KINDS = 12
SIGNATURE_ROWS = 64
SIGNATURE_BYTES = 2 << 20
WHOLE_BYTES = 1 << 20


def compare_weights(base: Checkpoint, expert: Checkpoint, seed: int = 0) -> Lineage:
    """How an expert relates to its base, from samples of both.

    Only tensors that both store in one shape are compared, tied ones once. The same rows are read
    of both, by ranges of bytes; a large model takes some tens of megabytes.

    Args:
        base: The base.
        expert: The expert, or any checkpoint of the same architecture.
        seed: Of the samples.
    """
    reader = RowReader()
    common = _common(base, expert)
    names = _chosen(common)
    modules = {name: role.module for name, role in roles_of(base.names).items()}
    found = (_tensor_agreement(base, expert, name, modules[name], reader, seed) for name in names)
    tensors = [tensor for tensor in found if tensor is not None]
    roles = role_agreements(tensors)
    heads = _heads(base, expert, common, tensors, reader, seed)
    moved = _moved(base, expert, tensors, reader, seed)
    kind, finding = verdict(tensors, roles, heads, moved)
    apart = [] if kind == "unknown" else unrelated_matrices(tensors, UNRELATED_BELOW)
    return Lineage(
        (base.name, base.path),
        (expert.name, expert.path),
        kind,
        finding,
        roles,
        tuple(heads),
        tuple(moved),
        tuple(tensor.name for tensor in apart),
        len(tensors),
        reader.size,
        tuple(tensor.name for tensor in tensors if not tensor.finite),
        _recovered(base, expert, common, heads, kind),
    )


def _recovered(
    base: Checkpoint,
    expert: Checkpoint,
    common: Sequence[str],
    heads: Sequence[HeadAgreement],
    kind: Kind,
) -> float | None:
    """What re-alignment recovers, from some of the attentions that were compared, read whole."""
    before = before_realignment(expert)
    if before is None and kind != "locked":
        return None
    shapes = {name: base.merged[name][0] for name in common}
    compared = {head.where for head in heads}
    known = [one for one in mappable(shapes, base.config) if one[0].where in compared]
    share = recovered(base.read, (before or expert).read, known[:REALIGNED])
    return None if math.isnan(share) else share


def _common(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Floating tensors that both have in one shape, in the base's order."""
    return [
        name
        for name, (shape, _) in base.merged.items()
        if 0 not in shape and expert.merged.get(name, ((), ""))[0] == shape
    ]


def _chosen(names: Sequence[str]) -> list[str]:
    """At most :data:`MOST_TENSORS` names, evenly spaced within each kind."""
    if len(names) <= MOST_TENSORS:
        return list(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    share = max(1, MOST_TENSORS // len(kinds))
    return [
        members[place]
        for members in list(kinds.values())[:MOST_TENSORS]
        for place in np.unique(np.linspace(0, len(members) - 1, share).astype(int))
    ]


def _tensor_agreement(
    base: Checkpoint, expert: Checkpoint, name: str, module: str, reader: RowReader, seed: int
) -> TensorAgreement | None:
    shape, dtype = base.merged[name]
    count, columns = matrix_view(shape)
    generator = generator_for(seed, name)
    indices = sampled_rows(count, columns * ITEMSIZE[dtype], TENSOR_BYTES, generator)
    ours = reader.rows(base, name, indices)
    odd = reader.odd
    theirs = reader.rows(expert, name, indices)
    if ours is None or theirs is None:
        return None
    role = "vectors" if len(shape) < 2 else module
    agreement = Agreement.of(ours, theirs, count * columns)
    finite = reader.odd == odd
    return TensorAgreement(name, role, agreement, ours.size, *row_agreement(ours, theirs), finite)


def _heads(
    base: Checkpoint,
    expert: Checkpoint,
    common: Sequence[str],
    tensors: Sequence[TensorAgreement],
    reader: RowReader,
    seed: int,
) -> list[HeadAgreement]:
    """Products of the attentions that moved most."""
    shapes = {name: base.merged[name][0] for name in common}
    attentions = find_attentions(shapes, base.config)
    if not attentions:
        return []
    distances = {tensor.name: tensor.agreement.distance for tensor in tensors}

    def moved(attention: Attention) -> float:
        """The largest distance of its matrices; none where it was not sampled."""
        names = {matrix.name for matrix in attention.matrices.values()}
        return max((distances.get(name, 0.0) for name in names), default=0.0)

    most = _most_attentions(base, attentions[0])
    chosen = sorted(attentions, key=moved, reverse=True)[:most]
    heads = HeadReader(base, expert, reader, seed)
    return [one for attention in chosen for one in heads.agreements(attention)]


def _most_attentions(base: Checkpoint, attention: Attention) -> int:
    """How many attentions the budget allows."""
    query = attention.matrices["query"]
    columns = matrix_view(base.shape(query.name))[1]
    each = 3 * attention.counts.width * columns * ITEMSIZE[base.tensors[query.name].dtype]
    fewest, most = ATTENTIONS
    return max(fewest, min(most, ATTENTION_BYTES // max(each, 1)))


def _moved(
    base: Checkpoint,
    expert: Checkpoint,
    tensors: Sequence[TensorAgreement],
    reader: RowReader,
    seed: int,
) -> list[MovedUnits]:
    """Units in other places, looked for in one matrix of each kind that is far from the base's."""
    kinds = {tensor.kind: tensor.name for tensor in reversed(_far(tensors))}
    found = []
    for name in list(kinds.values())[-MOST_KINDS:]:
        found += _moved_in(base, expert, name, reader, seed)
    return found


def _far(tensors: Sequence[TensorAgreement]) -> list[TensorAgreement]:
    return unrelated_matrices(tensors, DISTANT_BELOW)


def _moved_in(
    base: Checkpoint, expert: Checkpoint, name: str, reader: RowReader, seed: int
) -> list[MovedUnits]:
    """Units that the columns of a matrix read, and for small ones those that its rows make."""
    shape, dtype = base.merged[name]
    count, columns = matrix_view(shape)
    width = columns * ITEMSIZE[dtype]
    generator = generator_for(seed, f"units of {name}")
    whole = count * width <= WHOLE_BYTES
    most = count if whole else min(SIGNATURE_ROWS, max(1, SIGNATURE_BYTES // width))
    indices = np.sort(generator.choice(count, size=most, replace=False))
    ours = reader.rows(base, name, indices)
    theirs = reader.rows(expert, name, indices)
    if ours is None or theirs is None:
        return []
    # A convolution's columns are its inputs, each with the positions of its kernel.
    unit = math.prod(shape[2:]) if columns == math.prod(shape[1:]) else 1
    found = [moved_units(name, ours, theirs, unit, generator)]
    if whole and found[0] is None:
        found = [moved_units(name, ours.T, theirs.T, 1, generator)]
    return [one for one in found if one is not None]
