"""Targets of a distillation: predictions of pivot and sources in the pivot's tokens, fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mergesearch.merging.distillation.pairing import Piece, pieces, token_pairs
from mergesearch.merging.distillation.predictions import (
    Predictions,
    mixed,
    only_where,
    share_of,
    translated,
)
from mergesearch.merging.distillation.reading import Reader, predictions, tokenized
from mergesearch.merging.distillation.settings import Settings
from mergesearch.merging.distillation.token_maps import (
    count_pairs,
    in_proportion,
    most_frequent,
    special_pairs,
    token_map,
)
from mergesearch.merging.distillation.tokenized import Tokenized, token_texts
from mergesearch.merging.distillation.weights import FUSIONS


@dataclass(frozen=True, eq=False)
class Targets:
    """What the pivot is trained towards.

    Attributes:
        texts: In the pivot's tokens.
        fused: Target of each text.
        weights: Of pivot and sources on each text ``(texts, 1 + sources)``.
        covered: Of each source, the part of the pivot's tokens that it says something about.
    """

    texts: Sequence[Tokenized]
    fused: Sequence[Predictions]
    weights: npt.NDArray[np.float64]
    covered: tuple[float, ...]


def make_targets(
    pivot: Reader, sources: Sequence[Reader], texts: Sequence[str], settings: Settings
) -> Targets:
    """Read all models on the texts, and fuse what they expect.

    Args:
        pivot: The model that is trained.
        sources: Models of any shape.
        texts: What they are read on.
        settings: Alignment, fusion, and how much of a prediction is kept.
    """
    ours = tokenized(pivot, texts)
    own = predictions(pivot, ours, settings.kept)
    told = [_translated(pivot, source, ours, texts, settings) for source in sources]
    # Where no source says anything the target is the text, not what the pivot knows already.
    spoken = [np.any([row.known for row in rows], axis=0) for rows in zip(*told, strict=True)]
    kept = [
        only_where(known, row, text.ids) for known, row, text in zip(spoken, own, ours, strict=True)
    ]
    by_text = list(zip(kept, *told, strict=True))
    weights = FUSIONS[settings.fusion](
        [_common(rows, text) for rows, text in zip(by_text, ours, strict=True)]
    )
    fused = [
        mixed(rows, each.tolist(), settings.kept)
        for rows, each in zip(by_text, weights, strict=True)
    ]
    covered = [np.concatenate([row.known for row in part]) for part in told]
    return Targets(ours, fused, weights, tuple(float(one.mean()) for one in covered))


def _common(rows: Sequence[Predictions], text: Tokenized) -> list[npt.NDArray[np.float64]]:
    """Probability of the right tokens by each model, where all of them say something."""
    known = np.all([row.known for row in rows], axis=0)
    return [share_of(row, text.ids)[known] for row in rows]


def _translated(
    pivot: Reader,
    source: Reader,
    ours: Sequence[Tokenized],
    texts: Sequence[str],
    settings: Settings,
) -> list[Predictions]:
    """What a source expects on each text, in the pivot's tokens."""
    theirs = tokenized(source, texts)
    expected = predictions(source, theirs, settings.kept)
    found = [
        pieces(one.ends.tolist(), two.ends.tolist()) for one, two in zip(ours, theirs, strict=True)
    ]
    our_texts = token_texts(pivot.tokenizer)
    their_texts = token_texts(source.tokenizer)
    rows = _statistics(settings.alignment, found, ours, theirs, our_texts, their_texts)
    needed = {int(one) for row in expected for one in np.unique(row.ids)}
    size = 1 + max([len(their_texts) - 1, *needed])
    mapping = token_map(
        rows,
        needed,
        [*their_texts, *[""] * (size - len(their_texts))],  # models may have more rows
        our_texts,
        special_pairs(source.tokenizer, pivot.tokenizer),
    )
    starts = settings.alignment == "starts"
    return [
        translated(row, piece, text.ids, mapping, starts=starts)
        for row, piece, text in zip(expected, found, ours, strict=True)
    ]


def _statistics(
    alignment: str,
    found: Sequence[Sequence[Piece]],
    ours: Sequence[Tokenized],
    theirs: Sequence[Tokenized],
    our_texts: Sequence[str],
    their_texts: Sequence[str],
) -> dict[int, dict[int, float]]:
    """Token of a source -> tokens of the pivot and their shares, as the texts tell."""
    if alignment == "edit":
        return {}
    if alignment == "starts":
        first = (
            (int(two.ids[piece.theirs.start]), int(one.ids[piece.ours.start]))
            for row, one, two in zip(found, ours, theirs, strict=True)
            for piece in row
        )
        return {one: in_proportion(row) for one, row in count_pairs(first).items()}
    from rapidfuzz.distance import Levenshtein

    @cache
    def distance(one: int, two: int) -> float:
        return float(Levenshtein.distance(our_texts[one], their_texts[two]))

    paired = (
        pair
        for row, one, two in zip(found, ours, theirs, strict=True)
        for pair in token_pairs(row, one, two, distance)
    )
    return {one: most_frequent(row) for one, row in count_pairs(paired).items()}
