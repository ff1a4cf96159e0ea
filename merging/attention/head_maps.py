"""Maps of the features of heads that leave a model as it is.

Scores are products of query and key, ``q · k = (M q) · (M⁻ᵀ k)`` (eq. 1), and what a head writes is
``O v = (O M⁻¹)(M v)`` (eq. 2), for every invertible ``M``. Queries that share a key share its map.
Where rotary positions turn pairs of features, only maps that commute with all rotations cancel:
rotations and factors of each pair (eq. 3). Where a norm, a gate or a clip stands between the two
sides, none does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.attention.heads import Attention, HeadCounts, HeadMatrix, Side

Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Pair = Literal["query-key", "value-output"]
#: A map for each group of heads ``(groups, width, width)``.
Maps = Mapping[Pair, Matrix]

#: The side that a map acts on, and the one that its inverse transpose acts on.
SIDES: Mapping[Pair, tuple[Side, Side]] = {
    "query-key": ("query", "key"),
    "value-output": ("value", "output"),
}
#: Tensors of an attention that act on single features of one side: norms of queries and keys or of
#: what heads write, and embeddings of relative positions that queries are multiplied by.
_ACTING: Mapping[Pair, re.Pattern[str]] = {
    "query-key": re.compile(
        r"(?:^|\.)(?:(?:[qk]|query|key)_?(?:norm|layernorm|ln|layer_norm)\b|rel_pos_[hw]\b"
        r"|pos_bias_[uv]\b|r_[wr]_bias\b|linear_pos\b|pos_(?:key|query)_proj\b"
        r"|distance_embedding\b)"
    ),
    "value-output": re.compile(r"(?:^|\.)(?:attn_sub_norm|inner_attn_ln|v_norm|sub_norm)\b"),
}
#: Model types whose attention has a gate of each feature between values and output.
_GATED = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
#: Model types whose rotary couples are neighbours; of all others they are halves of the head.
_NEIGHBOURS = frozenset(
    {
        *("blt", "chatglm", "codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5"),
        *("ernie4_5_moe", "glm", "glm4", "glm4v_text", "glm_ocr_text", "gptj", "helium"),
        *("llama4_text", "moonshine", "roformer"),
    }
)
#: Model types with rotary positions that their configuration does not name -> their share.
_UNSAID: Mapping[str, float] = {"chatglm": 0.5}
#: Parts of names of towers whose rotary positions no configuration tells.
_UNKNOWN = re.compile(r"(?:^|\.)visual\.")
#: Settings under which queries, keys and values are clipped.
_CLIPS = ("clip_qkv",)


@dataclass(frozen=True)
class Freedom:
    """Which maps cancel between the two sides of a pair.

    Attributes:
        pair: The sides.
        one: Features that positions turn, the first of each couple.
        other: The second of each.
        rest: Features that any invertible matrix may mix.
    """

    pair: Pair
    one: Indices
    other: Indices
    rest: Indices


def freedoms(
    attention: Attention, names: Iterable[str], config: Mapping[str, Any]
) -> tuple[Freedom, ...]:
    """The pairs of an attention whose features may be mapped, and how.

    Args:
        attention: By its stored matrices.
        names: All stored tensors.
        config: Content of ``config.json``.
    """
    types = frozenset(_model_types(config))
    own = [name for name in names if name.startswith(attention.where)]
    return tuple(
        _freedom(pair, attention.counts, types)
        for pair, sides in SIDES.items()
        if all(side in attention.matrices for side in sides)
        and not any(_ACTING[pair].search(name) for name in own)
        and not _is_interrupted(pair, attention, types, config)
    )


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The type of a model and those of its towers."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)


def _is_interrupted(
    pair: Pair, attention: Attention, types: frozenset[str], config: Mapping[str, Any]
) -> bool:
    """Whether something acts on single features in between, or may do so."""
    if any(config.get(key) for key in _CLIPS):
        return True
    if pair == "query-key":
        return _UNKNOWN.search(attention.where) is not None
    return bool(types & _GATED)


def _freedom(pair: Pair, counts: HeadCounts, types: frozenset[str]) -> Freedom:
    unsaid = max((_UNSAID.get(one, 0.0) for one in types), default=0.0)
    rotary = max(counts.rotary, int(unsaid * counts.width)) // 2 * 2
    rotary = rotary if pair == "query-key" else 0
    half = np.arange(rotary // 2)
    rest = np.arange(rotary, counts.width)
    if types & _NEIGHBOURS:
        return Freedom(pair, 2 * half, 2 * half + 1, rest)
    return Freedom(pair, half, half + rotary // 2, rest)


def block_map(freedom: Freedom, width: int, turned: Matrix, mixed: Matrix) -> Matrix:
    """A map from its parts ``(width, width)``.

    Args:
        freedom: Where they belong.
        width: Features of a head.
        turned: Real and imaginary part of the factor of each couple ``(2, couples)`` (eq. 3).
        mixed: Map of the rest ``(rest, rest)``.
    """
    result = np.zeros((width, width))
    one = freedom.one
    other = freedom.other
    result[one, one] = turned[0]
    result[one, other] = -turned[1]
    result[other, one] = turned[1]
    result[other, other] = turned[0]
    result[np.ix_(freedom.rest, freedom.rest)] = mixed
    return result


def inverse_transposes(maps: Matrix) -> Matrix:
    """``M⁻ᵀ`` of every map ``(groups, width, width)``."""
    return np.asarray(np.linalg.inv(maps).transpose(0, 2, 1))


def side_heads(matrix: HeadMatrix, counts: HeadCounts) -> list[tuple[int, Indices]]:
    """The group of each block of features of a side, and the positions of these."""
    share = counts.heads // counts.groups
    step = 1 if matrix.side in ("query", "output") else share
    return [(head // share, matrix.features(counts, head)) for head in range(0, counts.heads, step)]


def mapped(tensor: Matrix, name: str, attention: Attention, maps: Maps) -> Matrix:
    """A stored matrix or bias of an attention with maps applied to the sides that it holds."""
    result = tensor.copy()
    for pair, sides in SIDES.items():
        if pair not in maps:
            continue
        acting = (maps[pair], inverse_transposes(maps[pair]))
        for side, act in zip(sides, acting, strict=True):
            matrix = attention.matrices[side]
            if name in (matrix.name, matrix.bias):
                _map_side(result, name, matrix, attention.counts, act)
    return result


def _map_side(
    result: Matrix, name: str, matrix: HeadMatrix, counts: HeadCounts, act: Matrix
) -> None:
    turned = matrix.axis == 1 and name == matrix.name
    features_first = result.T if turned else result
    for group, features in side_heads(matrix, counts):
        features_first[features] = act[group] @ features_first[features]


def names_of(attention: Attention, pairs: Iterable[Pair]) -> frozenset[str]:
    """Stored tensors that maps of these pairs change."""
    matrices = [attention.matrices[side] for pair in pairs for side in SIDES[pair]]
    names = {name for matrix in matrices for name in (matrix.name, matrix.bias)}
    return frozenset(name for name in names if name is not None)
