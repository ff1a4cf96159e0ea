"""Where attention keeps the matrices of its heads, told from names, shapes and configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.tensors.fused_heads import fused_layout

Side = Literal["query", "key", "value", "output"]
#: How the features of a matrix belong to heads: one side alone, all queries before all keys before
#: all values, or group by group (the group's queries, its key, its value).
Packing = Literal["alone", "concatenated", "by_group"]
Shapes = Mapping[str, tuple[int, ...]]

#: Names of the three projections where each is a matrix of its own.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
#: Names of one matrix that holds all three.
FUSED: Mapping[str, Packing] = {
    "qkv_proj": "concatenated",
    "c_attn": "concatenated",
    "Wqkv": "concatenated",
    "qkv": "concatenated",
    "in_proj": "concatenated",
    "query_key_value": "by_group",
}
#: Names of the output projection, beside the others or below their parent (BERT, ViT).
OUTPUTS = (
    *("o_proj", "out_proj", "out_lin", "to_out.0", "c_proj", "Wo", "wo", "proj", "dense", "o"),
    *("output.dense", "out"),
)
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_INPUTS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
#: Keys of configurations of towers -> words in the names of their tensors.
_TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision_config": ("vision", "visual", "image"),
    "text_config": ("text", "language"),
}
_ROTARY = frozenset(
    {
        *("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base"),
        *("rotary_dim", "partial_rotary_factor", "rotary_embedding_base"),
    }
)


@dataclass(frozen=True)
class HeadCounts:
    """Heads of an attention.

    Attributes:
        heads: Of queries.
        groups: Of keys and values; as many as heads unless queries share them.
        width: Features of a head.
        rotary: Leading features that rotary positions turn; 0 where there are none.
    """

    heads: int
    groups: int
    width: int
    rotary: int = 0


@dataclass(frozen=True)
class Declared:
    """Heads as a configuration declares them.

    Attributes:
        heads: Of queries.
        groups: Of keys and values.
        width: Features of a head, or None where it is not said.
        rotary: Share of the features that rotary positions turn, or their number where it is
            above 1.
        tower: Key of the configuration of the tower that they are of; empty for the model's own.
        inputs: Features that the tower passes on, or None where it is not said.
    """

    heads: int
    groups: int
    width: int | None
    rotary: float
    tower: str = ""
    inputs: int | None = None

    def likelihood(self, where: str, inputs: int) -> tuple[bool, bool]:
        """Whether names, and inputs, are those of this tower; what fits better sorts later."""
        words = _TOWERS.get(self.tower, (self.tower.removesuffix("_config"),))
        return bool(self.tower) and any(word in where for word in words), self.inputs == inputs

    def counts(self, width: int) -> HeadCounts:
        """The same with features of heads counted."""
        turned = self.rotary * (1 if self.rotary > 1 else width)
        return HeadCounts(self.heads, self.groups, width, min(width, int(turned)))


@dataclass(frozen=True)
class HeadMatrix:
    """One side of an attention inside a stored matrix.

    Attributes:
        name: The stored matrix.
        bias: Its bias, or None.
        axis: The dimension that runs over features of heads.
        side: Which side.
        packing: How features belong to heads.
    """

    name: str
    bias: str | None
    axis: int
    side: Side
    packing: Packing

    def features(self, counts: HeadCounts, head: int) -> npt.NDArray[np.int64]:
        """Positions along ``axis`` of a head's features (of its group's, for key and value)."""
        share = counts.heads // counts.groups
        group = head // share
        own = head if self.side in ("query", "output") else group
        first = own
        if self.packing == "by_group":
            place = {"query": head % share, "key": share, "value": share + 1}[self.side]
            first = group * (share + 2) + place
        elif self.packing == "concatenated":
            before = {"query": 0, "key": counts.heads, "value": counts.heads + counts.groups}
            first = before[self.side] + own
        return np.arange(first * counts.width, (first + 1) * counts.width)


@dataclass(frozen=True)
class Attention:
    """The attention of a block, by its stored matrices.

    Attributes:
        where: What the names of its matrices begin with.
        counts: Its heads.
        matrices: Its sides; the output may be missing.
    """

    where: str
    counts: HeadCounts
    matrices: Mapping[Side, HeadMatrix]


def find_attentions(shapes: Shapes, config: Mapping[str, Any]) -> list[Attention]:
    """Every attention whose heads are known, in the order of the names.

    Without a configuration (a single file) all heads are taken for one, which compares the sum
    over heads.

    Args:
        shapes: Name -> shape of the stored floating tensors.
        config: Content of ``config.json``.
    """
    known = list(_declared_heads(config))
    found = (_attention(name, shapes, known, config) for name in shapes)
    return [attention for attention in found if attention is not None]


def _attention(
    name: str, shapes: Shapes, known: list[Declared], config: Mapping[str, Any]
) -> Attention | None:
    """The attention whose query, or whose fused matrix, a tensor is."""
    match = re.fullmatch(r"(?P<where>(?:.*\.)?)(?P<word>\w+?)[._]weight", name)
    if match is None or len(shapes[name]) != 2:
        return None
    where = match["where"]
    word = match["word"]
    for words in SEPARATE:
        if word == words[0] and all(f"{where}{w}.weight" in shapes for w in words):
            return _separate(where, words, shapes, known)
    packing = _packing(name, word, shapes[name][0], config)
    return None if packing is None else _fused(where, name, packing, shapes, known)


def _packing(name: str, word: str, rows: int, config: Mapping[str, Any]) -> Packing | None:
    """How a fused matrix is packed, by its configuration or else by its name.

    None for all others, and for one whose sides are not in the order of query, key and value.
    """
    said = fused_layout(name, rows, config)
    if said is None:
        return FUSED.get(word)
    if said.sides != "qkv":
        return None
    return "concatenated" if said.groups == 1 else "by_group"


def _separate(
    where: str,
    words: tuple[str, str, str],
    shapes: Shapes,
    known: list[Declared],
) -> Attention | None:
    names = [f"{where}{word}.weight" for word in words]
    query, key, value = (shapes[name] for name in names)
    if len(key) != 2 or key != value:
        return None
    counts = _matching(query[0], key[0], _likeliest(known, where, query[1]))
    if counts is None:
        return None
    sides: tuple[Side, ...] = ("query", "key", "value")
    matrices = {
        side: HeadMatrix(name, _bias_of(name, shapes), 0, side, "alone")
        for side, name in zip(sides, names, strict=True)
    }
    return Attention(where, counts, matrices | _output(where, shapes, counts, turned=False))


def _fused(
    where: str,
    name: str,
    packing: Packing,
    shapes: Shapes,
    known: list[Declared],
) -> Attention | None:
    # GPT-2 stores (in, out), all others (out, in).
    turned = name.endswith("c_attn.weight") and shapes[name][1] > shapes[name][0]
    features, inputs = shapes[name][::-1] if turned else shapes[name]
    counts = _matching_fused(features, inputs, _likeliest(known, where, inputs))
    if counts is None:
        return None
    axis = int(turned)
    sides: tuple[Side, ...] = ("query", "key", "value")
    bias = _bias_of(name, shapes)
    matrices = {side: HeadMatrix(name, bias, axis, side, packing) for side in sides}
    return Attention(where, counts, matrices | _output(where, shapes, counts, turned))


def _output(where: str, shapes: Shapes, counts: HeadCounts, turned: bool) -> dict[Side, HeadMatrix]:
    """The output projection, if there is one of the right shape."""
    parent = where.rstrip(".").rpartition(".")[0]
    axis = 0 if turned else 1
    for prefix in (where, f"{parent}." if parent else ""):
        for word in OUTPUTS:
            name = f"{prefix}{word}.weight"
            shape = shapes.get(name, ())
            if len(shape) == 2 and shape[axis] == counts.heads * counts.width:
                return {"output": HeadMatrix(name, None, axis, "output", "alone")}
    return {}


def _bias_of(name: str, shapes: Shapes) -> str | None:
    bias = f"{name.removesuffix('weight')}bias"
    return bias if bias in shapes else None


def _likeliest(known: list[Declared], where: str, inputs: int) -> list[Declared]:
    """The declared heads, those of the likeliest tower first."""
    return sorted(known, key=lambda one: one.likelihood(where, inputs), reverse=True)


def _matching(queries: int, keys: int, known: list[Declared]) -> HeadCounts | None:
    """The declared heads that fit the features of queries and keys."""
    for one in known:
        width = one.width or queries // one.heads
        if one.heads * width == queries and one.groups * width == keys:
            return one.counts(width)
    return HeadCounts(1, 1, queries) if queries == keys and not known else None


def _matching_fused(features: int, inputs: int, known: list[Declared]) -> HeadCounts | None:
    """The declared heads that fit the features of a fused matrix."""
    for one in known:
        width = one.width or inputs // one.heads
        if (one.heads + 2 * one.groups) * width == features:
            return one.counts(width)
    return HeadCounts(1, 1, features // 3) if features == 3 * inputs and not known else None


def _declared_heads(config: Mapping[str, Any], tower: str = "") -> Iterator[Declared]:
    """What the configuration says of heads, for the model and each mapping inside (a tower)."""
    heads = next((config[key] for key in _HEADS if isinstance(config.get(key), int)), None)
    if heads:
        groups = next((config[key] for key in _GROUPS if isinstance(config.get(key), int)), heads)
        if config.get("multi_query") and not config.get("new_decoder_architecture"):
            groups = 1
        width = config.get("head_dim") or config.get("d_kv") or config.get("kv_channels")
        if heads % (groups or heads) == 0:
            inputs = next((config[k] for k in _INPUTS if isinstance(config.get(k), int)), None)
            rotary = _rotary_share(config)
            yield Declared(heads, groups or heads, width, rotary, tower, inputs)
    for key, part in config.items():
        if isinstance(part, Mapping):
            yield from _declared_heads(part, str(key))


def _rotary_share(config: Mapping[str, Any]) -> float:
    """Share of a head's features that rotary positions turn, or their number (GPT-J)."""
    parameters = config.get("rope_parameters")
    inner = parameters if isinstance(parameters, Mapping) else {}
    both = {**inner, **config}
    turns = bool(_ROTARY & both.keys()) or config.get("position_embedding_type") == "rotary"
    if not turns:
        return 0.0
    if isinstance(both.get("rotary_dim"), int):
        return float(both["rotary_dim"])
    share = both.get("partial_rotary_factor", both.get("rotary_pct", 1.0))
    return float(share) if isinstance(share, int | float) else 1.0
