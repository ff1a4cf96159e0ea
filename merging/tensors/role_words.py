"""The role of a tensor from the words of its name, where no family of models knows the name.

A name is a path of words. What a tensor is stands in its last words (``norm1``, ``fc2``); where it
acts stands in the words around them (``attn``, ``mlp``). Words that say one thing only are looked
for first, from the last word to the first; then words such as ``key`` or ``dense``, which are used
for several things.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergesearch.merging.tensors.role_patterns import ModelPart, Module

#: Last words that name a value of a module rather than a module.
_LEAVES = re.compile(
    r"weight(?:_[gv])?|bias|scale|running_(?:mean|var)|num_batches_tracked|original\d"
)

_NORM = re.compile(
    r"(?:^|_)(?:\w*(?:norm|layrnorm|normalization)|ln|bn)(?:\d|_|$)"
    r"|^(?:gamma|lambda)_?\d?$|layer_?scale|^ls\d?$|skip_scale"
)
_BATCH_NORM = re.compile(r"(?:^|_)bn\d?$|batch_?norm")

#: Layers that turn a condition, such as a time step, into scales and shifts.
_MODULATION = re.compile(
    r"adaln|modulation|(?:^|_)mod$|time_emb|timestep|(?:^|_)t_embedder|guidance|emb_layers"
    r"|scale_shift|add_embedding|time_text|vector_in|time_in|^norm_out$|t_block"
)

_ATTENTION = re.compile(r"att(?:n|ention|end)|(?:^|_)qkv|query_key_value|^w?qkv")
_MLP = re.compile(
    r"(?:^|_)(?:mlps?|ffn?|ffw|moe|feed_?forward|experts?|router)(?:\d|_|$)|dense(?:relu|gelu)\w*dense"
    r"|sparse_moe|pwconv|ffn"
)
_STATE_SPACE = re.compile(r"mamba|(?:^|_)ssm|linear_attn|recurrent|lstm|temporal_block|rg_lru")

_CONVOLUTION = re.compile(
    r"conv|patch_embed|^(?:shortcut|downsampl\w*|upsampl\w*|resnets?|reduction|squeeze\w*|se|stem"
    r"|patch_merging|skip_connection|in_layers|out_layers|op)$"
)

#: Words of several meanings, in the order of trial, after those of one.
_WEAK: tuple[tuple[re.Pattern[str], ModelPart], ...] = (
    (
        re.compile(
            r"^[qkvo]_(?:proj|lin|linear)$"
            r"|^(?:wqkv|query|key|value|receptance)(?:_proj|_lin|_linear)?$"
            r"|^to_(?:[qkv]|out)$|^add_[qkv]_proj$|^rel(?:ative)?_pos"
        ),
        "attention",
    ),
    (
        re.compile(
            r"^fc_?\d?$|^c_fc$|^lin(?:ear)?_?\d?$|(?:^|_)dense|^intermediate|^w[io]?_?\d?$"
            r"|(?:^|_)(?:up|down|gate)_proj$|^output|^proj_(?:in|out|mlp)$"
        ),
        "mlp",
    ),
    (re.compile(r"^(?:a_log|dt_bias|dt_proj|conv1d)$"), "state_space"),
    (_CONVOLUTION, "convolution"),
    (re.compile(r"^mixer$"), "state_space"),
)

#: Position of a norm among the layers of its block, where its name tells it.
_NORM_PARTS: tuple[tuple[re.Pattern[str], ModelPart], ...] = (
    (re.compile(r"post_att|pre_?(?:ff|mlp|feed)"), "mlp"),
    (re.compile(r"att|(?:^|_)sa_"), "attention"),
    (re.compile(r"(?:^|_)(?:ff|mlp|feed)|^final_|full_layer"), "mlp"),
    (re.compile(r"1$|before$|^input_|^pre_ln"), "attention"),
    (re.compile(r"[2-4]$|after$"), "mlp"),
)

_EMBEDDING = re.compile(
    r"emb|(?:^|_)tokens?$|token|^wt?[te]e?$|^wpe$|pos(?:ition|$|_)|patch|stem|^conv_in$|^conv\d?$"
    r"|prompt|probe|quer(?:y|ies)|^(?:img|txt|x|t)_in$|^input|feature_(?:projection|extractor)"
    r"|mapping_in|latents"
)
_EMBEDDED = re.compile(r"emb")
_PROJECTOR = re.compile(
    r"projector|projection|connector|merger|resampler|aligner|bridge|(?:^|_)neck|(?:^|_)mm_"
    r"|multi_modal|^mlp1$|adapter|^input_proj|^enc_output|^project_(?:in|out)$|^enc_to_dec|^image_proj"
)
_HEAD = re.compile(
    r"head|classif|predict|proj_out|logit|(?:^|_)out$|embed_out|score|^output|upscale"
    r"|hypernetwork|final_layer|^norm_out$|_pred$|^fc$|quantizer|^conv_head$|^lm$"
)


def words_of(name: str) -> list[str]:
    """The words of a name in small letters, without numbers and names of values."""
    words = [word.lower() for word in name.split(".")]
    while len(words) > 1 and (_LEAVES.fullmatch(words[-1]) or words[-1].isdigit()):
        words.pop()
    return [word for word in words if not word.isdigit()]


def role_in_block(words: Sequence[str], around: Sequence[str] = ()) -> tuple[Module, ModelPart]:
    """What a tensor of a block is, and where it acts.

    Args:
        words: Words of its name after the number of the block.
        around: Words before that number that may tell more, such as ``resnets``.
    """
    under_norm = _says(_NORM, words[:-1]) and not _is_norm(words)
    if under_norm or _says(_MODULATION, words):
        return "modulation", _norm_part(words, around)
    if _is_norm(words):
        return "norm", _norm_part(words, around)
    part = _strong_or_weak(words, around)
    return _MODULE_OF[part], part


def role_outside(words: Sequence[str]) -> tuple[Module, ModelPart]:
    """What a tensor outside the blocks is, and where it acts."""
    if _is_norm(words):
        around = _outside_part([*words[:-1], *_EMBEDDED.findall(words[-1])])
        return "norm", around if around in ("embedding", "projector", "head") else "final"
    part = _outside_part(words)
    if _says(_MODULATION, words):
        return "modulation", "head" if part == "head" else "embedding"
    if part == "embedding" and _says(_CONVOLUTION, words):
        return "convolution", part
    return _MODULE_OF[part], part


_MODULE_OF: dict[ModelPart, Module] = {
    "attention": "attention",
    "mlp": "mlp",
    "convolution": "convolution",
    "state_space": "state_space",
    "embedding": "embedding",
    "projector": "projector",
    "head": "head",
    "other": "other",
}


def _says(pattern: re.Pattern[str], words: Sequence[str]) -> bool:
    return any(pattern.search(word) for word in words)


def _is_norm(words: Sequence[str]) -> bool:
    return bool(words) and _NORM.search(words[-1]) is not None


def _norm_part(words: Sequence[str], around: Sequence[str]) -> ModelPart:
    """The part that a norm or a modulation belongs to."""
    if _says(_BATCH_NORM, words):
        return "convolution"
    outer = _strong_part(words[:-1])
    if outer != "other":
        return outer
    for word in words:
        for pattern, part in _NORM_PARTS:
            if _NORM.search(word) and pattern.search(word):
                return _strong_or_weak(around) if _says(_CONVOLUTION, around) else part
    return _strong_or_weak(words[:-1], around)


def _strong_or_weak(words: Sequence[str], around: Sequence[str] = ()) -> ModelPart:
    """The part that the words name, those of one meaning first, the last word first."""
    for part in (_strong_part(words), _strong_part(around), _weak_part(words), _weak_part(around)):
        if part != "other":
            return part
    return "other"


def _strong_part(words: Sequence[str]) -> ModelPart:
    for word in reversed(words):
        if _STATE_SPACE.search(word):
            return "state_space"
        if _ATTENTION.search(word):
            return "attention"
        if _MLP.search(word):
            return "mlp"
    return "other"


def _weak_part(words: Sequence[str]) -> ModelPart:
    for word in reversed(words):
        for pattern, part in _WEAK:
            if pattern.search(word):
                return part
    return "other"


def _outside_part(words: Sequence[str]) -> ModelPart:
    if _says(_HEAD, words):
        return "head"
    if _says(_PROJECTOR, words):
        return "projector"
    if _says(_EMBEDDED, words) or _says(_MODULATION, words):
        return "embedding"
    strong = _strong_part(words)
    if strong != "other":
        return strong
    if _says(_EMBEDDING, words):
        return "embedding"
    return "projector" if list(words[-1:]) == ["proj"] else _weak_part(words)
