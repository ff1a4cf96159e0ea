"""Products of query and key, and of value and output, head by head.

Attention sees queries and keys only through ``W_Q^T W_K`` (eq. 1) and values only through
``W_O W_V`` (eq. 2). A model is unchanged if a head's two matrices are multiplied by matrices that
cancel in the product, as MergeLock does to make merges fail, or by a factor and its inverse. With
rotary positions the product of query and key is ``W_Q^T R W_K`` with a rotation of each pair of
features (eq. 3), so only matrices that commute with all ``R`` cancel. Biases count as one more
input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.attention.head_maps import SIDES, Pair
from mergesearch.merging.attention.heads import Attention, HeadCounts, HeadMatrix
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE
from mergesearch.merging.lineage.agreement import Agreement
from mergesearch.merging.lineage.rows import Indices, RowReader, generator_for, matrix_view

Matrix = npt.NDArray[np.float64]
#: A matrix in base and expert.
Both = tuple[Matrix, Matrix]

#: Inputs and outputs of each matrix that a product is formed for.
POSITIONS = 96
#: Heads of one attention that are compared at most.
MOST_HEADS = 8
#: Bytes that the heads of one attention may take beyond the first.
HEAD_BYTES = 2 << 20


@dataclass(frozen=True)
class HeadAgreement:
    """How the matrices of one head agree with the base's, and how their product does.

    Attributes:
        where: What the names of the matrices begin with.
        head: Number of the (query) head.
        pair: Which product.
        first: Agreement of the elements of query or value.
        second: Agreement of the elements of key or output.
        product: Agreement of the product on samples.
        turned: Of the product under random rotations, where positions are rotary; else None.
    """

    where: str
    head: int
    pair: Pair
    first: Agreement
    second: Agreement
    product: Agreement
    turned: Agreement | None = None

    @property
    def elements(self) -> float:
        """The lower cosine of the two matrices."""
        return min(self.first.cosine, self.second.cosine)


@dataclass(frozen=True)
class HeadReader:
    """Reads the matrices of heads from base and expert.

    Attributes:
        base: The base.
        expert: The expert.
        reader: Reads rows.
        seed: Of the sampled inputs and outputs.
    """

    base: Checkpoint
    expert: Checkpoint
    reader: RowReader
    seed: int = 0

    def agreements(self, attention: Attention) -> list[HeadAgreement]:
        """Both products of some heads of one attention; fewer where tensors are not stored."""
        found = [
            self._agreement(attention, head, pair)
            for head in chosen_heads(self.base, attention)
            for pair, sides in SIDES.items()
            if all(side in attention.matrices for side in sides)
        ]
        return [one for one in found if one is not None]

    def _agreement(self, attention: Attention, head: int, pair: Pair) -> HeadAgreement | None:
        generator = generator_for(self.seed, f"{attention.where}{pair}{head}")
        sides = [
            self._both(attention.matrices[side], attention.counts, head, generator)
            for side in SIDES[pair]
        ]
        if sides[0] is None or sides[1] is None:
            return None
        first, second = sides[0], sides[1]
        rotary = attention.counts.rotary if pair == "query-key" else 0
        return HeadAgreement(
            attention.where,
            head,
            pair,
            Agreement.of(*first),
            Agreement.of(*second),
            Agreement.of(first[0].T @ second[0], first[1].T @ second[1]),  # eq. 1, 2
            _under_rotations(first, second, rotary, generator) if rotary >= 2 else None,
        )

    def _both(
        self, matrix: HeadMatrix, counts: HeadCounts, head: int, generator: np.random.Generator
    ) -> Both | None:
        """A head's features in base and expert at sampled inputs or outputs, with its bias."""
        rows, columns = matrix_view(self.base.shape(matrix.name))
        across = columns if matrix.axis == 0 else rows
        places = np.sort(generator.choice(across, size=min(POSITIONS, across), replace=False))
        features = matrix.features(counts, head)
        read = []
        for source in (self.base, self.expert):
            wanted = features if matrix.axis == 0 else places
            stored = self.reader.rows(source, matrix.name, wanted)
            if stored is None:
                return None
            chosen = stored[:, places] if matrix.axis == 0 else stored[:, features].T
            read.append(chosen.astype(np.float64))
        return self._with_bias((read[0], read[1]), matrix.bias, features)

    def _with_bias(self, both: Both, bias: str | None, features: Indices) -> Both:
        """Base and expert with the bias as one more column, at most as long as the base's others.

        Biases of queries and keys can be so large that nothing else would count.
        """
        if bias is None or bias not in self.expert.tensors:
            return both
        read = [self.reader.rows(source, bias, np.arange(1)) for source in (self.base, self.expert)]
        if read[0] is None or read[1] is None:
            return both
        ours = read[0][0, features].astype(np.float64)
        length = float(np.linalg.norm(ours))
        if length == 0:
            return both
        factor = min(1.0, float(np.linalg.norm(both[0], axis=0).mean()) / length)
        theirs = read[1][0, features].astype(np.float64)
        return (
            np.column_stack((both[0], ours * factor)),
            np.column_stack((both[1], theirs * factor)),
        )


def chosen_heads(base: Checkpoint, attention: Attention) -> list[int]:
    """Query heads to compare: the first of evenly spaced groups, as many as the budget allows."""
    counts = attention.counts
    query = attention.matrices["query"]
    rows, columns = matrix_view(base.shape(query.name))
    inputs = columns if query.axis == 0 else min(rows, POSITIONS)
    each = 3 * counts.width * inputs * ITEMSIZE[base.tensors[query.name].dtype]
    most = max(1, min(counts.groups, MOST_HEADS, HEAD_BYTES // max(each, 1)))
    groups = np.unique(np.linspace(0, counts.groups - 1, most).astype(int))
    return [int(group) * (counts.heads // counts.groups) for group in groups]


def _under_rotations(
    first: Both, second: Both, rotary: int, generator: np.random.Generator
) -> Agreement:
    """Agreement of the product with a random rotation of each pair of features (eq. 3).

    Pairs are halves of the head or neighbours, by the architecture; the layout that agrees better
    counts, as matrices that cancel in one of them only leave a model of that layout unchanged.
    """
    angles = generator.uniform(0.0, 2 * math.pi, rotary // 2)
    half = np.arange(rotary // 2)
    layouts = ((half, half + rotary // 2), (2 * half, 2 * half + 1))
    agreements = [
        Agreement.of(
            first[0].T @ _rotated(second[0], layout, angles),
            first[1].T @ _rotated(second[1], layout, angles),
        )
        for layout in layouts
    ]
    return max(agreements, key=lambda agreement: agreement.cosine)


def _rotated(
    matrix: Matrix,
    layout: tuple[Indices, Indices],
    angles: npt.NDArray[np.float64],
) -> Matrix:
    one, other = layout
    cosines = np.cos(angles)[:, None]
    sines = np.sin(angles)[:, None]
    result = matrix.copy()
    result[one] = cosines * matrix[one] - sines * matrix[other]
    result[other] = sines * matrix[one] + cosines * matrix[other]
    return result
