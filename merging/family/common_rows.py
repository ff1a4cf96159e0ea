"""Checkpoints of different vocabularies, seen with the rows of the merged vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.family.aligned import Make, unstored, with_tensors
from mergesearch.merging.family.tokenizer_files import renumbered
from mergesearch.merging.family.vocabulary import (
    Alignment,
    aligned_base,
    aligned_expert,
    with_vocabulary_size,
)

_Made = dict[str, tuple[TensorInfo, Make]]


def with_common_rows(sources: Sequence[Checkpoint], alignment: Alignment) -> list[Checkpoint]:
    """Base and experts whose embeddings and heads have the rows of ``alignment``."""
    experts = sources[1:]
    return [
        _base_with_rows(sources[0], experts, alignment),
        *(_expert_with_rows(sources, k, alignment) for k in range(len(experts))),
    ]


def _base_with_rows(
    base: Checkpoint, experts: Sequence[Checkpoint], alignment: Alignment
) -> Checkpoint:
    made: _Made = {}
    if alignment.moves_base:
        for name in alignment.names:
            info = _with_rows(base, name, alignment.size, base.merged[name][1])
            make = partial(aligned_base, alignment, name, base, experts)
            made |= _and_copies(base, name, (info, make))
    config = with_vocabulary_size(base.config, alignment.sizes[0], alignment.size)
    config = renumbered(config, alignment.renumbered, f"{base.path}/config.json")
    if not made:
        return base
    return with_tensors(base, made, config=config, done=_done(alignment), beside=experts)


def _expert_with_rows(
    sources: Sequence[Checkpoint], index: int, alignment: Alignment
) -> Checkpoint:
    base = sources[0]
    experts = sources[1:]
    expert = experts[index]
    made: _Made = {}
    for name in alignment.names:
        dtype = _wider(expert.merged[name][1], base.merged[name][1])
        info = _with_rows(expert, name, alignment.size, dtype)
        make = partial(aligned_expert, alignment, name, index, base, experts)
        made |= _and_copies(expert, name, (info, make))
    config = with_vocabulary_size(expert.config, alignment.sizes[1 + index], alignment.size)
    return with_tensors(expert, made, config=config, done=_done(alignment), beside=sources)


def _done(alignment: Alignment) -> str:
    return f"vocabulary {alignment.digest}"


def _with_rows(source: Checkpoint, name: str, rows: int, dtype: str) -> TensorInfo:
    return unstored(source, (rows, *source.merged[name][0][1:]), dtype)


def _and_copies(source: Checkpoint, name: str, made: tuple[TensorInfo, Make]) -> _Made:
    """The tensor under its name and under those of its stored copies."""
    return {name: made, **{alias: made for alias, kept in source.aliases.items() if kept == name}}


def _wider(one: str, other: str) -> str:
    """The dtype that holds both; two halves of different kind fit fp32."""
    if one == other:
        return one
    return "float64" if "float64" in (one, other) else "float32"
