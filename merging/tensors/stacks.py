"""Tensors that hold several matrices: stacks of experts, fused gates, fused queries, keys, values.

Layouts are told from names and from the shapes of the tensors beside them, which is all that a
state dict has:

* Stacks of experts ``(experts, out, in)`` (Qwen3-MoE, Mixtral, Granite) or ``(experts, in, out)``
  (gpt-oss, Llama 4). Which one it is follows from the projection back, whose inputs are half the
  outputs of the gate.
* Gate and up projection one below the other, or row by row in turns (gpt-oss, whose stacks alone
  have biases).
* Queries, keys and values one below the other where queries share keys (Phi-3) or a stage has more
  features than it reads (Hiera, SAM 2): the output projection reads as many features as the queries
  have. Thirds as wide as they are high are told by their name alone
  (:mod:`mergesearch.merging.operators.parts.matrices`).
* Keys and values one below the other beside their queries (timm's pooling), and what enters the
  single blocks of Flux: queries, keys, values and the MLP's features.
* Queries, keys and values in turns, head by head or group by group, where a configuration says how
  many heads there are (:mod:`mergesearch.merging.tensors.fused_heads`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergesearch.merging.tensors.fused_heads import Config, Rows, fused_layout

Shapes = Mapping[str, tuple[int, ...]]

#: A tensor of the experts of a mixture.
_EXPERTS = re.compile(r"(?:^|[._])experts?[._]|(?:^|\.)block_sparse_moe\.(?:input|output)_linear\.")
#: Gate and up projection in one -> the projection back that stands beside it.
_GATES = (
    (re.compile(r"(?P<where>.*\.|^)gate_up_proj(?P<end>(?:\.weight)?)"), "down_proj"),
    (re.compile(r"(?P<where>.*\.|^)input_linear(?P<end>\.weight)"), "output_linear"),
    (re.compile(r"(?P<where>.*\.mlp\.)Wi(?P<end>\.weight)"), "Wo"),
    (re.compile(r"(?P<where>.*\.mlp\.)dense_h_to_4h(?P<end>\.weight)"), "dense_4h_to_h"),
)
#: The projection back -> the gate beside it.
_BACK = {"down_proj": "gate_up_proj", "output_linear": "input_linear"}
#: Queries, keys and values one below the other, by name as where they are equal thirds.
_QUERIES = re.compile(
    r"(?P<where>.*(?:\.|^))(?:qkv|Wqkv|(?<=self_attn\.)qkv_proj)\.weight|(?P<torch>.*)in_proj_weight"
)
#: Keys and values one below the other, beside queries of their own.
_KEYS_VALUES = re.compile(r"(?P<where>.*(?:\.|^))kv\.weight")
#: Queries, keys, values and the MLP's features of a block in which both read the same (Flux).
_SINGLE_BLOCK = re.compile(r"(?P<where>.*(?:\.|^)single_blocks\.\d+\.)linear1\.weight")
_OUTPUTS = ("o_proj", "out_proj", "proj", "Wo", "dense")


@dataclass(frozen=True)
class StackLayout:
    """The matrices in a tensor.

    Attributes:
        members: Matrices along the first dimension; 0 where the tensor is one matrix.
        shape: ``(out, in)`` of each of them.
        transposed: Whether each is stored as ``(in, out)``.
        parts: The matrices inside each of them, by their rows; none for a stack of vectors.
    """

    members: int
    shape: tuple[int, int]
    transposed: bool
    parts: tuple[Rows, ...]


def stack_layouts(shapes: Shapes, config: Config | None = None) -> dict[str, StackLayout]:
    """Name -> layout of every tensor that holds several matrices, or several vectors.

    Args:
        shapes: Name -> shape of all tensors of a model.
        config: Content of its ``config.json``, which says how fused heads are divided.
    """
    found = {
        name: _divided(name, shape, config or {}) or _layout(name, shape, shapes)
        for name, shape in shapes.items()
    }
    return {name: layout for name, layout in found.items() if layout is not None}


def config_of(source: object) -> Config:
    """The configuration of a source, or of what it is made from; empty where there is none."""
    while not hasattr(source, "config") and hasattr(source, "origin"):
        source = source.origin
    found: Any = getattr(source, "config", None)
    return found or {}


def _divided(name: str, shape: tuple[int, ...], config: Config) -> StackLayout | None:
    fused = fused_layout(name, shape[0], config) if config and len(shape) == 2 else None
    return None if fused is None else StackLayout(0, (shape[0], shape[1]), False, fused.parts)


def _layout(name: str, shape: tuple[int, ...], shapes: Shapes) -> StackLayout | None:
    if 0 in shape:
        return None
    if len(shape) == 3 and _EXPERTS.search(name):
        return _stack(name, shape, shapes)
    if len(shape) != 2:
        return None
    if name.endswith("_bias") and _is_stack(name.removesuffix("_bias"), shapes):
        return StackLayout(shape[0], (1, shape[1]), False, ())
    down = _beside(name, shapes)
    if down is not None and len(down) == 2 and shape[0] == 2 * down[1]:
        return StackLayout(0, (shape[0], shape[1]), False, _halves(shape[0], in_turns=False))
    rows = (shape[0], shape[1])
    return (
        _shared_keys(name, rows, shapes)
        or _keys_and_values(name, rows, shapes)
        or _single_block(name, rows, shapes)
    )


def _is_stack(name: str, shapes: Shapes) -> bool:
    return len(shapes.get(name, ())) == 3 and _EXPERTS.search(name) is not None


def _stack(name: str, shape: tuple[int, ...], shapes: Shapes) -> StackLayout:
    """A stack of experts: one matrix for each, or gate and up projection of each."""
    gate, back = _pair(name, shapes)
    transposed = gate[2] == 2 * back[1] and gate[1] == back[2] > 0
    fused = _is_gate(name) and (transposed or gate[1] == 2 * back[2] > 0)
    out, inner = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    in_turns = transposed and f"{name}_bias" in shapes
    parts = _halves(out, in_turns=in_turns) if fused else (Rows(0, out),)
    return StackLayout(shape[0], (out, inner), transposed, parts)


def _pair(name: str, shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of fused gate and projection back of a stack's experts; zeros where they are not."""
    gate = name if _is_gate(name) else None
    for word, back in _BACK.items():
        if gate is None and f".{word}." in f".{name}.":
            gate = name.replace(word, back)
    none = (0, 0, 0)
    if gate is None or gate not in shapes:
        return none, none
    other = _beside(gate, shapes)
    return (none, none) if other is None or len(other) != 3 else (shapes[gate], other)


def _is_gate(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern, _ in _GATES)


def _beside(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """Shape of the projection back beside a fused gate."""
    for pattern, back in _GATES:
        match = pattern.fullmatch(name)
        if match is not None:
            return shapes.get(f"{match['where']}{back}{match['end']}")
    return None


def _halves(rows: int, *, in_turns: bool) -> tuple[Rows, ...]:
    half = rows // 2
    return (Rows(0, half, 2), Rows(1, half, 2)) if in_turns else (Rows(0, half), Rows(half, half))


def _shared_keys(name: str, shape: tuple[int, int], shapes: Shapes) -> StackLayout | None:
    """Queries, keys and values of grouped queries, by the features that the output reads."""
    match = _QUERIES.fullmatch(name)
    if match is None:
        return None
    where = match["where"] if match["torch"] is None else match["torch"]
    for word in _OUTPUTS:
        output = shapes.get(f"{where}{word}.weight", ())
        keys, odd = divmod(shape[0] - output[1], 2) if len(output) == 2 else (0, 1)
        thirds = shape[0] == 3 * shape[1]  # told by name
        if not odd and not thirds and 0 < keys <= output[1] and output[1] % keys == 0:
            queries = output[1]
            parts = (Rows(0, queries), Rows(queries, keys), Rows(queries + keys, keys))
            return StackLayout(0, shape, False, parts)
    return None


def _keys_and_values(name: str, shape: tuple[int, int], shapes: Shapes) -> StackLayout | None:
    match = _KEYS_VALUES.fullmatch(name)
    queries = shapes.get(f"{match['where']}q.weight", ()) if match is not None else ()
    if len(queries) != 2 or shape[0] != 2 * queries[0]:
        return None
    return StackLayout(0, shape, False, _halves(shape[0], in_turns=False))


def _single_block(name: str, shape: tuple[int, int], shapes: Shapes) -> StackLayout | None:
    """Four matrices, if the projection back reads as many features as values and MLP have."""
    match = _SINGLE_BLOCK.fullmatch(name)
    hidden = shape[1]
    mlp = shape[0] - 3 * hidden
    back = shapes.get(f"{match['where']}linear2.weight") if match is not None else None
    if mlp <= 0 or back != (hidden, hidden + mlp):
        return None
    parts = (*(Rows(side * hidden, hidden) for side in range(3)), Rows(3 * hidden, mlp))
    return StackLayout(0, shape, False, parts)
