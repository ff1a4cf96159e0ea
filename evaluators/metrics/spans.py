"""Precision, recall and F1 score of spans, such as names of entities, as seqeval finds them.

A span counts as right where its place and its type are. seqeval reads tags as the evaluation of
CoNLL-2000 did (Tjong Kim Sang and Buchholz 2000); its scores are those of all spans of a domain
together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.metrics.libraries import check_library, library
from mergesearch.evaluators.pooling import Pool
from mergesearch.merging import InputError

Array = npt.NDArray[np.float64]

#: Tags that seqeval knows: beginning, inside, end, single, outside.
_TAG = re.compile(r"O|[BIES](-.+)?")


def check_spans(names: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuse names of classes that are no tags of spans, and a missing library.

    Args:
        names: Domain -> names of its classes.
        where: Key of the study file, for messages.

    Raises:
        InputError: In one line.
    """
    check_library("seqeval", f"{where}.objectives", extra="spans")
    odd = next((name for row in names.values() for name in row if not _TAG.fullmatch(name)), None)
    if odd is not None:
        raise InputError(
            f"{where}.tags: expected classes such as O, B-PER and I-PER for scores of spans, "
            f"received {odd!r}; measure f1, or list such names in data.classes"
        )


def span_counts(answers: Sequence[str], tags: Sequence[str]) -> tuple[int, int, int]:
    """Number of spans of one text that are right, that are answered, and that there are."""
    entities = library("seqeval.metrics.sequence_labeling").get_entities
    found, true = ({*entities(list(row))} for row in (answers, tags))
    return len(found & true), len(found), len(true)


def span_f1(parts: Sequence[Array]) -> float:
    """F1 score from right, answered and true spans ``(items,)``; 0 without any."""
    right, answered, true = (float(part.sum()) for part in parts)
    return 2 * right / (answered + true) if answered + true else 0.0


def span_precision(parts: Sequence[Array]) -> float:
    """Share of the answered spans that are right, from the same; 0 without any."""
    right, answered, _ = (float(part.sum()) for part in parts)
    return right / answered if answered else 0.0


def span_recall(parts: Sequence[Array]) -> float:
    """Share of the true spans that are found, from the same; 0 without any."""
    right, _, true = (float(part.sum()) for part in parts)
    return right / true if true else 0.0


SPAN_SCORES: Mapping[str, Pool] = {
    "span_f1": span_f1,
    "span_precision": span_precision,
    "span_recall": span_recall,
}


def span_parts(metric: str, counts: Sequence[tuple[int, int, int]]) -> dict[str, Array]:
    """A metric's scores of single texts ``(items,)``, and its parts.

    Args:
        metric: A key of :data:`SPAN_SCORES`.
        counts: As of :func:`span_counts`, of each text.
    """
    columns = np.array(counts, dtype=np.float64).reshape(-1, 3)
    own = np.array([SPAN_SCORES[metric](list(row[:, None])) for row in columns])
    names = ("right", "answered", "true")
    parts = {f"{metric}/{name}": column for name, column in zip(names, columns.T, strict=True)}
    return {metric: own, **parts}
