"""Tensors that only some sources have: untied heads, new heads, and heads that were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.adapter_heads import HEAD_SETTINGS
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.tied import find_aliases, ties_embeddings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.aligned import Make, unstored, with_tensors
from mergesearch.merging.family.messages import listed

if TYPE_CHECKING:
    import torch


def untied(sources: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Every source with output heads of its own, if any of them has one.

    The heads of tied sources are copies.
    """
    pairs: dict[str, str] = {}
    for source in sources:
        always = dict(find_aliases(source.tensors, tied=False))
        pairs |= {a: kept for a, kept in find_aliases(source.tensors, tied=True) if a not in always}
    if not pairs or not any(ties_embeddings(source.config) for source in sources):
        return list(sources)
    return [_with_heads(source, pairs) for source in sources]


def _with_heads(source: Checkpoint, pairs: Mapping[str, str]) -> Checkpoint:
    made = {
        alias: (unstored(source, *source.merged[kept]), partial(source.read, kept))
        for alias, kept in pairs.items()
        if alias not in source.tensors and kept in source.merged
    }
    if not ties_embeddings(source.config):
        return with_tensors(source, made, done="untied")
    # A source that says it is tied and is not must be read as what it is, its fingerprint included.
    honest = replace(source, config=_untied_config(source.config))
    return with_tensors(honest, made, done="untied")


def _untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(config) | {"tie_word_embeddings": False}
    text = changed.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = text | {"tie_word_embeddings": False}
    return changed


def completed(sources: Sequence[Checkpoint], policy: str) -> tuple[list[Checkpoint], set[str]]:
    """Sources with the same tensors, and the names of those that no coefficient acts on."""
    base = sources[0]
    experts = sources[1:]
    new = [
        n
        for n in experts[0].merged
        if policy != "own" and n not in base.tensors and all(n in e.merged for e in experts)
    ]
    lacking = [_lacking(base, expert) for expert in experts]
    nowhere = set.intersection(*lacking)
    infos = {name: _new_info(base, experts, name) for name in new}
    made = {
        name: (info, made_of(experts, name, policy, info.dtype)) for name, info in infos.items()
    }
    first = with_tensors(
        base,
        made,
        config=with_heads_of(base, experts) if new else None,
        done=f"absent {policy}",
        beside=experts,
    )
    others = [
        with_tensors(
            e,
            {n: (base.tensors[n], partial(base.read, n)) for n in names},
            done="kept",
            beside=[base],
        )
        for e, names in zip(experts, lacking, strict=True)
    ]
    return [first, *others], nowhere | (set(new) if policy == "average" else set())


def _lacking(base: Checkpoint, expert: Checkpoint) -> set[str]:
    """Tensors of the base that an expert lacks.

    A head that the expert ties does not count, and stays an error.
    """
    heads = (
        {a for a, _ in find_aliases(base.tensors, tied=True)}
        if ties_embeddings(expert.config)
        else set()
    )
    return {*base.merged} - {*expert.tensors} - heads


def _new_info(base: Checkpoint, experts: Sequence[Checkpoint], name: str) -> TensorInfo:
    shapes = {expert.merged[name][0] for expert in experts}
    if len(shapes) > 1:
        raise CheckpointError(
            f"tensor {name!r}, which the base lacks: expected one shape in all experts, received "
            f"{', '.join(str(list(shape)) for shape in sorted(shapes))}; leave out the experts "
            "that differ"
        )
    usual = Counter(dtype for _, dtype in base.merged.values()).most_common(1)[0][0]
    return unstored(base, shapes.pop(), usual)


def made_of(experts: Sequence[Checkpoint], name: str, policy: str, dtype: str) -> Make:
    """What makes the :func:`starting_tensor` of the experts' tensors of a name."""

    def make() -> torch.Tensor:
        import torch

        tensors = [expert.read(name) for expert in experts]
        return starting_tensor(tensors, policy).to(getattr(torch, dtype))

    return make


def starting_tensor(tensors: Sequence[torch.Tensor], policy: str) -> torch.Tensor:
    """The base's tensor where the base has none: zero, or the average of the experts.

    In fp32 or wider.
    """
    import torch

    wide = (
        torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    )
    total = torch.zeros(tensors[0].shape, dtype=wide, device=tensors[0].device)
    if policy == "average":
        for tensor in tensors:
            total += tensor.to(total.device, wide)
    return total / len(tensors)


def with_heads_of(base: Checkpoint, experts: Sequence[Checkpoint]) -> dict[str, Any]:
    """The base's configuration with the settings of the experts' heads.

    The experts must agree on them.
    """
    changed = dict(base.config)
    for key in HEAD_SETTINGS:
        values = [expert.config[key] for expert in experts if key in expert.config]
        if any(value != values[0] for value in values):
            raise CheckpointError(
                f"config.json: expected the same {key} in all experts, whose heads the base lacks, "
                f"received {listed({str(value) for value in values})}"
            )
        if values:
            changed[key] = values[0]
    return changed
