"""From tensor names to groups that share coefficients.

:func:`classify` reads one name by anchored patterns; :func:`group_tensors` collects the tensors of a layout at
one of the granularities. Names are read as transformers stores them and as it holds them in memory, with or
without the prefix of the model that wraps the tower.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

from merging import InputError, Layout, TensorSpec

#: What a tensor is.
Module = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
#: Where it acts: a norm is of the module ``norm``, but belongs to the part whose input or output it scales.
Part = Literal["attention", "mlp", "embedding", "head", "final", "other"]
#: How finely coefficients vary, from coarse to fine.
Granularity = Literal["global", "task", "module", "block", "block_module", "tensor"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

Rule = tuple[str, Module, Part]


@dataclass(frozen=True)
class Place:
    """Where a tensor sits in its model.

    Attributes:
        block: Number of the residual block as written in the name, or None outside the blocks.
        module: What it is.
        tower: ``vision``, ``text`` or ``decoder`` where the name says so, else empty. Each has its own depth axis.
        part: Where it acts.
    """

    block: int | None
    module: Module
    tower: str
    part: Part


@dataclass(frozen=True)
class Group:
    """Tensors that share coefficients.

    Attributes:
        name: Label in tables, for example ``block 3/attention``.
        tensors: Names of the tensors, in the order of the layout.
        ranges: Flat ``(start, stop)`` ranges in increasing order; padding belongs to the tensor before it.
        parameters: Number of parameters, padding excluded.
        depth: 0 for the first block of its tower, 1 for the last, None outside the blocks.
        module: The module, where all its tensors are of one, else None.
    """

    name: str
    tensors: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    parameters: int
    depth: float | None
    module: Module | None


#: Family -> (word before the block number, rules for what follows it). The first rule that matches wins.
#: Norms go with the part inside which their name puts them (BERT's ``attention.output.LayerNorm``), otherwise with
#: the one they precede; Gemma's second norm after attention, named as Llama's norm before the MLP, goes with the MLP.
BLOCK_FAMILIES: Mapping[str, tuple[str, tuple[Rule, ...]]] = {
    # BERT, RoBERTa, DistilBERT
    "bert": (
        "layer",
        (
            (r"(?:cross)?attention\.output\.LayerNorm\.", "norm", "attention"),
            (r"output\.LayerNorm\.", "norm", "mlp"),
            (r"sa_layer_norm\.", "norm", "attention"),
            (r"output_layer_norm\.", "norm", "mlp"),
            (r"(?:cross)?attention\.", "attention", "attention"),
            (r"(?:intermediate|output)\.dense\.|ffn\.", "mlp", "mlp"),
        ),
    ),
    # ViT, DeiT: stored (`encoder.layer.3.`) and in memory (`layers.3.`)
    "vit": (
        "layers?",
        (
            (r"attention\.", "attention", "attention"),
            (r"mlp\.|(?:intermediate|output)\.dense\.", "mlp", "mlp"),
            (r"layernorm_before\.", "norm", "attention"),
            (r"layernorm_after\.", "norm", "mlp"),
        ),
    ),
    # CLIP, SigLIP: both towers
    "clip": (
        "layers",
        (
            (r"self_attn\.[a-z]+_proj\.", "attention", "attention"),
            (r"mlp\.fc\d\.", "mlp", "mlp"),
            (r"layer_norm1\.", "norm", "attention"),
            (r"layer_norm2\.", "norm", "mlp"),
        ),
    ),
    "gpt2": (
        "h",
        (
            (r"(?:attn|crossattention)\.", "attention", "attention"),
            (r"mlp\.", "mlp", "mlp"),
            (r"(?:ln_1|ln_cross_attn)\.", "norm", "attention"),
            (r"ln_2\.", "norm", "mlp"),
        ),
    ),
    # Llama, Mistral, Qwen, Gemma, and their mixtures of experts (expert numbers stand after `mlp.experts.`)
    "llama": (
        "layers",
        (
            (r"self_attn\.[qk]_norm\.", "norm", "attention"),
            (r"self_attn\.", "attention", "attention"),
            (r"(?:mlp|block_sparse_moe|feed_forward)\.", "mlp", "mlp"),
            (r"input_layernorm\.", "norm", "attention"),
            (r"(?:post_attention|pre_feedforward|post_feedforward)_layernorm\.", "norm", "mlp"),
        ),
    ),
    # timm, OpenCLIP, and the vision tower of Qwen-VL
    "timm": (
        "blocks|resblocks",
        (
            (r"attn\.", "attention", "attention"),
            (r"mlp\.", "mlp", "mlp"),
            (r"(?:norm1|ln_1)\.", "norm", "attention"),
            (r"(?:norm2|ln_2)\.", "norm", "mlp"),
        ),
    ),
}

#: Rules for names outside the blocks, tried in this order: the norm of a head is no final norm.
OUTSIDE_BLOCKS: tuple[Rule, ...] = (
    (r"embeddings\.(?:LayerNorm|layernorm|norm)\.|pre_layrnorm\.|ln_pre\.", "norm", "embedding"),
    (r"embeddings\.|embed_tokens\.|embed_positions\.|patch_embed\.|shared\.|wte\.|wpe\.", "embedding", "embedding"),
    (r"(?:cls_token|pos_embed|positional_embedding|class_embedding)$|token_embedding\.", "embedding", "embedding"),
    (r"(?:cls\.predictions\.transform|lm_head|head)\.(?:LayerNorm|layer_norm|layernorm)\.", "norm", "head"),
    (r"vocab_layer_norm\.|fc_norm\.", "norm", "head"),
    (r"(?:\w+_)?classifier\.|lm_head\.|heads?\.|cls\.|pooler\.|score\.|qa_outputs\.", "head", "head"),
    (r"(?:visual|text)_projection(?:\.|$)|vocab_(?:transform|projector)\.|logit_(?:scale|bias)$", "head", "head"),
    (r"(?:layernorm|norm|ln_f|final_layer_?norm|post_layernorm|ln_post|ln_final)\.", "norm", "final"),
)

#: Any other numbered block.
GENERAL_BLOCK = r"(?:layers|blocks|h|layer|block|resblocks)\.(?P<block>\d+)\."

#: Words of a prefix that name a tower. An encoder is the main tower of its model.
TOWERS: Mapping[str, str] = {
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "text_model": "text",
    "language_model": "text",
    "decoder": "decoder",
}

# Prefixes are words, never numbers: the number of an expert or of a Sequential entry cannot hide in them.
_PREFIX = r"(?P<prefix>(?:[A-Za-z_]\w*\.){0,5}?)"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Module, Part], ...]:
    """All rules, compiled and anchored at the start of the name, in the order in which they are tried."""
    blocks = [
        (re.compile(rf"{_PREFIX}(?:{stem})\.(?P<block>\d+)\.(?:{pattern})"), module, part)
        for stem, rules in BLOCK_FAMILIES.values()
        for pattern, module, part in rules
    ]
    outside = [(re.compile(rf"{_PREFIX}(?:{pattern})"), module, part) for pattern, module, part in OUTSIDE_BLOCKS]
    return (*blocks, *outside, (re.compile(_PREFIX + GENERAL_BLOCK), "other", "other"))


@lru_cache(maxsize=65536)
def classify(name: str) -> Place:
    """Read the place of a tensor from its name.

    A name of no known family gets its block from the first ``layers.N.`` (or ``blocks``, ``h``, ``layer``,
    ``block``, ``resblocks``) after a prefix of words, and the module ``other``.
    """
    for pattern, module, part in _patterns():
        match = pattern.match(name)
        if match:
            number = match.groupdict().get("block")
            return Place(None if number is None else int(number), module, _tower(match["prefix"]), part)
    return Place(None, "other", _tower(name), "other")


def _tower(prefix: str) -> str:
    return next((TOWERS[word] for word in prefix.split(".") if word in TOWERS), "")


def block_axes(places: Iterable[Place]) -> dict[str, tuple[int, ...]]:
    """Tower -> its block numbers in increasing order; numbers may have gaps, depth counts the blocks present."""
    axes: dict[str, set[int]] = {}
    for place in places:
        if place.block is not None:
            axes.setdefault(place.tower, set()).add(place.block)
    return {tower: tuple(sorted(blocks)) for tower, blocks in sorted(axes.items())}


def group_tensors(layout: Layout, granularity: Granularity, exclude: Collection[str] = ()) -> tuple[Group, ...]:
    """Groups that cover every tensor of ``layout`` but the excluded ones, each exactly once.

    ``global`` and ``task`` make one group (and differ in whether experts share its coefficient); ``module`` one per
    module; ``block`` one per block, and ``block_module`` one per block and part, beside ``embedding``, ``final``,
    ``head`` and ``other`` for what lies outside the blocks; ``tensor`` one per tensor. Where a model has several
    towers, labels start with the tower.

    Args:
        layout: The tensors.
        granularity: One of :data:`GRANULARITIES`.
        exclude: Names of tensors to leave out.

    Raises:
        InputError: If no numbered block is recognised at a granularity that needs blocks, or nothing is left.
    """
    specs = [spec for spec in layout.tensors if spec.name not in exclude]
    if not specs:
        raise InputError("space.exclude: expected at least one tensor to stay, received patterns that match all")
    axes = block_axes(classify(spec.name) for spec in specs)
    if granularity in ("block", "block_module") and not axes:
        raise InputError(
            f"space.granularity: {granularity!r} needs numbered blocks, received {len(specs)} tensors without any, "
            f"such as {specs[0].name!r}; use 'task', 'module' or 'tensor'"
        )
    buckets: dict[str, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: _order(classify(spec.name), granularity)):
        buckets.setdefault(_label(spec.name, granularity, several_towers=len(axes) > 1), []).append(spec)
    ends = dict(zip(layout.names, [*layout.segment_starts(), layout.size][1:], strict=True))
    return tuple(_group(name, members, granularity, axes, ends) for name, members in buckets.items())


_PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "other", "final", "head")
_MODULES: tuple[Module, ...] = get_args(Module)


def _order(place: Place, granularity: Granularity) -> tuple[str, int, int, int]:
    """Sort key: per tower embedding, blocks, final norm, head; modules in their fixed order; tensors as they lie."""
    if granularity in ("global", "task", "tensor"):
        return ("", 0, 0, 0)
    if granularity == "module":
        return (place.tower, 0, 0, _MODULES.index(place.module))
    if place.block is None:
        return (place.tower, _PARTS.index(place.part), -1, 0)
    part = _PARTS.index(place.part) if granularity == "block_module" else 0
    return (place.tower, _PARTS.index("attention"), place.block, part)


def _label(name: str, granularity: Granularity, *, several_towers: bool) -> str:
    place = classify(name)
    tower = f"{place.tower}/" if several_towers and place.tower else ""
    if granularity == "tensor":
        return name
    if granularity in ("global", "task"):
        return "all"
    if granularity == "module":
        return tower + place.module
    if place.block is None:
        return tower + place.part
    return f"{tower}block {place.block}" + (f"/{place.part}" if granularity == "block_module" else "")


def _group(
    name: str,
    members: list[TensorSpec],
    granularity: Granularity,
    axes: Mapping[str, tuple[int, ...]],
    ends: Mapping[str, int],
) -> Group:
    members = sorted(members, key=lambda spec: spec.start)
    places = [classify(spec.name) for spec in members]
    modules = {place.module for place in places}
    blockwise = granularity in ("block", "block_module", "tensor")
    return Group(
        name=name,
        tensors=tuple(spec.name for spec in members),
        ranges=_join((spec.start, ends[spec.name]) for spec in members),
        parameters=sum(spec.size for spec in members),
        depth=_depth(places[0], axes) if blockwise else None,
        module=modules.pop() if len(modules) == 1 else None,
    )


def _depth(place: Place, axes: Mapping[str, tuple[int, ...]]) -> float | None:
    if place.block is None:
        return None
    axis = axes[place.tower]
    return axis.index(place.block) / max(len(axis) - 1, 1)


def _join(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in increasing order with touching neighbours joined and empty ones dropped."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)
