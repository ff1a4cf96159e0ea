"""Tensors that are not merged by themselves: tied copies, integers, and computed constants."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.tensors.layout import FLOATING

#: Floating constants that are computed from the configuration, not learned: copied from the base.
_CONSTANTS = re.compile(r"(.*\.)?(rotary_emb\.(\w+_)?inv_freq|(attn|attention)\.masked_bias)")

#: Causal masks of shape ``(1, 1, n, n)`` that older GPT checkpoints store beside their weights.
_MASKS = re.compile(r"(.*\.)?(attn|attention)\.bias")

#: Output heads of the families, and the input embeddings that they may share, the preferred one
#: first.
_HEADS = re.compile(
    r"(.*\.)?(lm_head|lm_head\.(decoder|out_proj)|(cls\.)?predictions\.decoder|head\.decoder"
    r"|vocab_projector|generator_lm_head|proj_out|embed_out|output_projection|lm_loss|pred_layer\.proj)\.weight"
)
_EMBEDDINGS = (
    *("shared", "embed_tokens", "wte", "word_embeddings", "embed_in"),
    *("tok_embeddings", "tokens_embed", "word_embedding", "embeddings"),
)

#: Alias -> kept, by name: ties of vectors, and ties that hold whatever the configuration says.
_BIASES = (
    (r"((?:.*\.)?(?:cls\.)?predictions)\.decoder\.bias", r"\1.bias"),
    (r"((?:.*\.)?lm_head)\.decoder\.bias", r"\1.bias"),
)
_ALWAYS = ((r"((?:.*\.)?)(?:encoder|decoder)\.embed_tokens\.weight", r"\1shared.weight"),)

#: Model types whose head is tied unless the configuration says otherwise (older files leave the key
#: out).
_TIED_BY_DEFAULT = frozenset(
    {
        *(
            "albert",
            "bart",
            "bert",
            "bloom",
            "camembert",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "gpt2",
        ),
        *(
            "gpt_neo",
            "longformer",
            "marian",
            "mbart",
            "mobilebert",
            "modernbert",
            "mpnet",
            "opt",
            "pegasus",
        ),
        *("roberta", "t5", "whisper", "xlm-roberta"),
    }
)


def is_carried(name: str, info: TensorInfo) -> bool:
    """Whether a merge copies this tensor from the base: integers, booleans, computed constants."""
    if info.dtype not in FLOATING or _CONSTANTS.fullmatch(name):
        return True
    return len(info.shape) == 4 and info.shape[:2] == (1, 1) and _MASKS.fullmatch(name) is not None


def is_vocabulary_head(name: str) -> bool:
    """Whether a tensor of this name is an output head over the vocabulary."""
    return _HEADS.fullmatch(name) is not None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a model of this ``config.json`` shares its input embeddings with its output head."""
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return config.get("model_type") in _TIED_BY_DEFAULT


def find_aliases(tensors: Mapping[str, TensorInfo], tied: bool) -> Iterator[tuple[str, str]]:
    """Pairs (alias, kept name) of tied tensors that are both stored."""
    renames = _ALWAYS + (_BIASES if tied else ())
    for name, info in tensors.items():
        kept = next((re.sub(a, b, name) for a, b in renames if re.fullmatch(a, name)), None)
        if kept is None and tied:
            kept = _embedding_of(name, tensors)
        if kept is not None and kept in tensors and _alike(info, tensors[kept]):
            yield name, kept


def _embedding_of(head: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    if not is_vocabulary_head(head):
        return None
    for part in _EMBEDDINGS:
        for name, info in tensors.items():
            if f".{name}".endswith(f".{part}.weight") and _alike(info, tensors[head]):
                return name
    return None


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
