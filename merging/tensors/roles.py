"""From tensor names to their roles in a model: block, module, tower.

:func:`classify` reads one name by anchored patterns. Names are read as transformers stores them and
as it holds them in memory, with or without the prefix of the model that wraps the tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

#: What a tensor is.
Module = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
#: Where it acts: a norm is of the module ``norm``, but belongs to the part whose input or output it
#: scales.
ModelPart = Literal["attention", "mlp", "embedding", "head", "final", "other"]

RolePattern = tuple[str, Module, ModelPart]


@dataclass(frozen=True)
class TensorRole:
    """Where a tensor sits in its model.

    Attributes:
        block: Number of the residual block as written in the name, or None outside the blocks.
        module: What it is.
        tower: ``vision``, ``text`` or ``decoder`` where the name says so, else empty. Each has its
            own depth axis.
        part: Where it acts.
    """

    block: int | None
    module: Module
    tower: str
    part: ModelPart


#: Family -> (word before the block number, rules for what follows it). The first rule that matches
#: wins. Norms go with the part inside which their name puts them (BERT's
#: ``attention.output.LayerNorm``), otherwise with the one they precede; Gemma's second norm after
#: attention, named as Llama's norm before the MLP, goes with the MLP.
BLOCK_FAMILIES: Mapping[str, tuple[str, tuple[RolePattern, ...]]] = {
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
    # Llama, Mistral, Qwen, Gemma, and their mixtures of experts (expert numbers stand after
    # `mlp.experts.`)
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
OUTSIDE_BLOCKS: tuple[RolePattern, ...] = (
    (r"embeddings\.(?:LayerNorm|layernorm|norm)\.|pre_layrnorm\.|ln_pre\.", "norm", "embedding"),
    (
        r"embeddings\.|embed_tokens\.|embed_positions\.|patch_embed\.|shared\.|wte\.|wpe\.",
        "embedding",
        "embedding",
    ),
    (
        r"(?:cls_token|pos_embed|positional_embedding|class_embedding)$|token_embedding\.",
        "embedding",
        "embedding",
    ),
    (
        r"(?:cls\.predictions\.transform|lm_head|head)\.(?:LayerNorm|layer_norm|layernorm)\.",
        "norm",
        "head",
    ),
    (r"vocab_layer_norm\.|fc_norm\.", "norm", "head"),
    (
        r"(?:\w+_)?classifier\.|lm_head\.|heads?\.|cls\.|pooler\.|score\.|qa_outputs\.",
        "head",
        "head",
    ),
    (
        r"(?:visual|text)_projection(?:\.|$)|vocab_(?:transform|projector)\.|logit_(?:scale|bias)$",
        "head",
        "head",
    ),
    (
        r"(?:layernorm|norm|ln_f|final_layer_?norm|post_layernorm|ln_post|ln_final)\.",
        "norm",
        "final",
    ),
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

# Prefixes are words, never numbers: the number of an expert or of a Sequential entry cannot hide in
# them.
_PREFIX = r"(?P<prefix>(?:[A-Za-z_]\w*\.){0,5}?)"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Module, ModelPart], ...]:
    """All patterns, compiled and anchored at the start of the name, in the order of trial."""
    blocks = [
        (re.compile(rf"{_PREFIX}(?:{stem})\.(?P<block>\d+)\.(?:{pattern})"), module, part)
        for stem, rules in BLOCK_FAMILIES.values()
        for pattern, module, part in rules
    ]
    outside = [
        (re.compile(rf"{_PREFIX}(?:{pattern})"), module, part)
        for pattern, module, part in OUTSIDE_BLOCKS
    ]
    return (*blocks, *outside, (re.compile(_PREFIX + GENERAL_BLOCK), "other", "other"))


@lru_cache(maxsize=65536)
def classify(name: str) -> TensorRole:
    """Read the role of a tensor from its name.

    A name of no known family gets its block from the first ``layers.N.`` (or ``blocks``, ``h``,
    ``layer``, ``block``, ``resblocks``) after a prefix of words, and the module ``other``.
    """
    for pattern, module, part in _patterns():
        match = pattern.match(name)
        if match:
            number = match.groupdict().get("block")
            return TensorRole(
                None if number is None else int(number), module, _tower(match["prefix"]), part
            )
    return TensorRole(None, "other", _tower(name), "other")


def _tower(prefix: str) -> str:
    return next((TOWERS[word] for word in prefix.split(".") if word in TOWERS), "")


def block_axes(roles: Iterable[TensorRole]) -> dict[str, tuple[int, ...]]:
    """Tower -> its block numbers in increasing order.

    Numbers may have gaps: depth counts the blocks that are present.
    """
    axes: dict[str, set[int]] = {}
    for role in roles:
        if role.block is not None:
            axes.setdefault(role.tower, set()).add(role.block)
    return {tower: tuple(sorted(blocks)) for tower, blocks in sorted(axes.items())}


def depth_of(name: str, axes: Mapping[str, tuple[int, ...]]) -> float | None:
    """Depth of a tensor: 0 in the first block of its tower, 1 in the last, None outside.

    ``axes`` are those of :func:`block_axes`.
    """
    role = classify(name)
    if role.block is None:
        return None
    axis = axes[role.tower]
    return axis.index(role.block) / max(len(axis) - 1, 1)
