"""Predictions of next tokens as a few ids with shares, and their arithmetic.

A prediction that nothing is known of is the token that stands there, as FuseLLM has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.distillation.pairing import Piece
from mergesearch.merging.distillation.token_maps import TokenMap

#: The least probability of the token that stands there: the rest of a prediction is not kept.
LEAST = 1e-4

Ids = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model expects at each token of a text.

    Attributes:
        ids: Tokens ``(tokens, kept)``; an id may repeat.
        shares: Their probabilities, of the same shape; each row adds up to 1.
        known: Whether the row comes from the model ``(tokens,)``; else it is the token itself.
    """

    ids: Ids
    shares: Shares
    known: npt.NDArray[np.bool_]


def given(tokens: Ids) -> Predictions:
    """The tokens that stand there, as predictions ``(tokens, 1)``."""
    return Predictions(
        tokens[:, None].copy(), np.ones((len(tokens), 1), np.float32), np.zeros(len(tokens), bool)
    )


def gathered(ids: Ids, shares: Shares, keep: int) -> tuple[Ids, Shares]:
    """Rows in which every id stands once, the ``keep`` largest shares of each, adding up to 1.

    Args:
        ids, shares: ``(tokens, entries)``; a row without any share stays so.
        keep: Entries to keep.
    """
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    sorted_shares = np.take_along_axis(shares, order, axis=1)
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    place = np.cumsum(new, axis=1) - 1
    sums = np.zeros(shares.shape, dtype=np.float64)
    np.add.at(sums, (np.arange(len(ids))[:, None], place), sorted_shares)
    once = np.zeros_like(ids)
    np.put_along_axis(once, place, sorted_ids, axis=1)
    best = np.argsort(-sums, axis=1, kind="stable")[:, :keep]
    kept = np.take_along_axis(sums, best, axis=1)
    total = kept.sum(axis=1, keepdims=True)
    scaled = np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)
    return np.take_along_axis(once, best, axis=1), scaled.astype(np.float32)


def translated(
    theirs: Predictions, found: Sequence[Piece], tokens: Ids, mapping: TokenMap, *, starts: bool
) -> Predictions:
    """Predictions of a source in tokens of the pivot.

    Where a piece of text begins, both models have read the same characters: the source's prediction
    of its first token is one of the pivot's. Elsewhere nothing is known.

    Args:
        theirs: Predictions of the source.
        found: Pieces of the text.
        tokens: The pivot's tokens ``(tokens,)``.
        mapping: Tokens of the source -> tokens of the pivot.
        starts: Use the beginnings of all pieces; else of those with one token on each side.
    """
    used = [piece for piece in found if starts or piece.single]
    used = [piece for piece in used if theirs.known[piece.theirs.start]]
    at = np.array([piece.ours.start for piece in used], dtype=np.int64)
    rows = np.array([piece.theirs.start for piece in used], dtype=np.int64)
    keep = theirs.ids.shape[1]
    ids = np.repeat(tokens[:, None], keep, axis=1)
    shares = np.zeros(ids.shape, dtype=np.float32)
    shares[:, 0] = 1.0
    known = np.zeros(len(tokens), dtype=bool)
    if len(used):
        wide = theirs.ids[rows]
        spread = theirs.shares[rows][:, :, None] * mapping.shares[wide]
        mapped, mapped_shares = gathered(
            mapping.ids[wide].reshape(len(used), -1), spread.reshape(len(used), -1), keep
        )
        good = mapped_shares.sum(axis=1) > 0
        width = mapped.shape[1]
        ids[at[good], :width] = mapped[good]
        shares[at[good], :] = 0.0
        shares[at[good], :width] = mapped_shares[good]
        known[at[good]] = True
    return Predictions(ids, shares, known)


def only_where(known: npt.NDArray[np.bool_], own: Predictions, tokens: Ids) -> Predictions:
    """Predictions at some tokens of a text, and elsewhere the tokens themselves.

    Args:
        known: Where they are kept ``(tokens,)``.
        own: Of all tokens.
        tokens: Those that stand there ``(tokens,)``.
    """
    sure = np.zeros_like(own.shares)
    sure[:, 0] = 1.0
    wide = known[:, None]
    return Predictions(
        np.where(wide, own.ids, tokens[:, None]),
        np.where(wide, own.shares, sure),
        own.known & known,
    )


def mixed(parts: Sequence[Predictions], weights: Sequence[float], keep: int) -> Predictions:
    """The weighted sum of predictions of the same tokens.

    Args:
        parts: Of each model.
        weights: Of each model, adding up to 1; those with weight 0 count for nothing.
        keep: Entries of a row to keep.
    """
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    ids, shares = gathered(
        np.concatenate([part.ids for part, _ in used], axis=1),
        np.concatenate([part.shares * np.float32(weight) for part, weight in used], axis=1),
        keep,
    )
    return Predictions(ids, shares, np.any([part.known for part, _ in used], axis=0))


def share_of(predictions: Predictions, tokens: Ids) -> npt.NDArray[np.float64]:
    """Probability of the tokens that stand there ``(tokens,)``, at least ``LEAST``."""
    hits = predictions.ids == tokens[:, None]
    shares = np.where(hits, predictions.shares, 0).sum(axis=1, dtype=np.float64)
    least: npt.NDArray[np.float64] = np.maximum(shares, LEAST)
    return least
