"""Anchored patterns of tensor names in well-known families of models.

Names are read as transformers stores them and as it holds them in memory. What no pattern knows is
read from its words by :mod:`mergesearch.merging.tensors.role_words`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

#: What a tensor is. ``modulation`` turns a condition, such as a time step, into scales and shifts
#: of other layers; ``projector`` carries the states of one tower to another.
Module = Literal[
    "attention",
    "mlp",
    "convolution",
    "state_space",
    "norm",
    "modulation",
    "embedding",
    "projector",
    "head",
    "other",
]
#: Where it acts: a norm is of the module ``norm``, but belongs to the part whose input or output it
#: scales.
ModelPart = Literal[
    "attention",
    "mlp",
    "convolution",
    "state_space",
    "embedding",
    "projector",
    "head",
    "final",
    "other",
]

RolePattern = tuple[str, Module, ModelPart]

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

# Prefixes are words, never numbers: the number of an expert or of a Sequential entry cannot hide in
# them.
PREFIX = r"(?P<prefix>(?:[A-Za-z_]\w*\.){0,5}?)"

CompiledPattern = tuple[re.Pattern[str], Module, ModelPart]


@cache
def block_patterns() -> tuple[CompiledPattern, ...]:
    """The patterns of names in blocks, anchored at the start of the name, in the order of trial."""
    return tuple(
        (re.compile(rf"{PREFIX}(?:{stem})\.(?P<block>\d+)\.(?:{pattern})"), module, part)
        for stem, rules in BLOCK_FAMILIES.values()
        for pattern, module, part in rules
    )


@cache
def outside_patterns() -> tuple[CompiledPattern, ...]:
    """The patterns of names outside the blocks, in the order of trial."""
    return tuple(
        (re.compile(rf"{PREFIX}(?:{pattern})"), module, part)
        for pattern, module, part in OUTSIDE_BLOCKS
    )
