"""From scores of layers to bits under a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


def allocate_bits(
    scores: Floats, sizes: Sequence[int], choices: Sequence[int], mean: float
) -> Whole:
    """Bits of each layer, as many as the budget allows: ``(layers,)``.

    A layer of score s would have the choice next to s + c, where c is an offset that all layers
    share and that rises until the budget is spent. So a layer of a higher score never has fewer
    bits than another of its size, only differences of scores count, and a score is in bits. Among
    equal scores the first layers come first; a rise that does not fit any more is passed over.

    Args:
        scores: ``(layers,)``.
        sizes: Elements of each layer.
        choices: Bits to choose from, in increasing order.
        mean: Most bits of an element in the mean; at least the first choice.
    """
    budget = mean * sum(sizes)
    count = len(sizes)
    chosen = np.zeros(count, np.int64)
    spent = float(choices[0] * sum(sizes))
    # The offset at which each layer rises to each choice but the first.
    middles = (np.asarray(choices[1:], np.float64) + np.asarray(choices[:-1])) / 2
    offsets = middles[:, None] - scores[None, :]
    for rise in np.argsort(offsets, axis=None, kind="stable").tolist():
        level, layer = divmod(rise, count)
        cost = (choices[level + 1] - choices[level]) * sizes[layer]
        if chosen[layer] == level and spent + cost <= budget * (1 + 1e-12):
            chosen[layer] = level + 1
            spent += cost
    return np.asarray(choices, np.int64)[chosen]


def ranked_scores(importance: Floats, choices: Sequence[int]) -> Floats:
    """Scores by which layers are ordered as by their importance: ``(layers,)``.

    Ranks are spread evenly over as many bits as lie between the least and the greatest choice;
    equal importances share a rank.
    """
    from scipy.stats import rankdata

    ranks = rankdata(importance) - 1
    span = choices[-1] - choices[0]
    return np.asarray((ranks / max(len(ranks) - 1, 1) - 0.5) * span)
