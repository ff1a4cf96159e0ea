"""Fused projections whose rows belong to queries, keys and values in turns, told from the config.

Some architectures store queries, keys and values as one matrix and let them take turns: head by
head, or group by group where queries share keys. Names and shapes do not tell where one ends, so
the heads come from ``config.json``. The layouts are those of the attention classes in transformers
and, for models that are not part of it, of the code that is published beside their weights:

=====================  ===========================================================================
architecture           rows of its fused matrix
=====================  ===========================================================================
GPT-NeoX, BLOOM        for each head: query, key, value (also Persimmon, MiniMax, DeBERTa, Falcon-RW
                       and the first ChatGLM)
Falcon                 for each key head: its queries, key, value; one key head with ``multi_query``
InternLM2              for each key head: its queries, key, value
ChatGLM2, 3, GLM-4     queries, keys, values; as many keys and values as there are groups
GPT-BigCode            the same with one key head; for each head query, key, value without it
Qwen, Baichuan         queries, keys, values
CodeGen                for each of four parts: queries, values, keys
DeepSeek (MLA)         for each head: key, value; and the latent features before the rotary key
Qwen3-Next             for each key head: query, key, values, gates; for each head: query, gate
=====================  ===========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Config = Mapping[str, Any]

_HEADS = ("n_head", "num_attention_heads", "num_heads")
_KEY_HEADS = ("num_kv_heads", "n_head_kv", "num_key_value_heads")
#: CodeGen's weights are laid out for as many accelerators, whatever runs them.
_CODEGEN_PARTS = 4


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that form another.

    Attributes:
        start: The first of them.
        count: How many there are.
        step: From the beginning of a run of them to the next run.
        width: Rows of a run.
    """

    start: int
    count: int
    step: int = 1
    width: int = 1


@dataclass(frozen=True)
class FusedLayout:
    """How the rows of a fused matrix belong to the matrices that it holds.

    Attributes:
        groups: How often the matrices take turns; 1 where they lie one below the other.
        widths: Rows of each matrix within a group, in order.
        sides: What each of them makes: queries, keys, values, gates, or latent features.
    """

    groups: int
    widths: tuple[int, ...]
    sides: str = "qkv"

    def fits(self, rows: int) -> bool:
        """Whether a tensor of so many rows is filled, by more than nothing of each matrix."""
        return min(self.widths) > 0 and self.groups * sum(self.widths) == rows > 0

    @property
    def parts(self) -> tuple[Rows, ...]:
        """The rows of each matrix."""
        ends = list(accumulate(self.widths))
        starts = [end - width for end, width in zip(ends, self.widths, strict=True)]
        runs = zip(starts, self.widths, strict=True)
        if self.groups == 1:
            return tuple(Rows(start, width) for start, width in runs)
        return tuple(Rows(start, self.groups * width, ends[-1], width) for start, width in runs)


#: A configuration and the rows of a tensor -> how these are divided, or None if it does not say.
Reader = Callable[[Config, int], FusedLayout | None]


def fused_layout(name: str, rows: int, config: Config) -> FusedLayout | None:
    """How a fused projection is divided; None if it is none, or the configuration does not say.

    Configurations of the towers of a model are looked through too.

    Args:
        name: Of the tensor.
        rows: Its first dimension.
        config: Content of ``config.json``.
    """
    found = {
        layout
        for part in _parts(config)
        for kinds, pattern, read in _TABLE
        if _is_of(part, kinds) and pattern.search(name)
        if (layout := read(part, rows)) is not None and layout.fits(rows)
    }
    return found.pop() if len(found) == 1 else None


def is_fused(name: str) -> bool:
    """Whether a weight goes by the name of a fused projection of attention."""
    return _NAMES.search(name) is not None


def _parts(config: Config) -> Iterator[Config]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _is_of(config: Config, kinds: str) -> bool:
    return not kinds or config.get("model_type") in kinds.split()


def _number(config: Config, *keys: str) -> int:
    """The first of the keys that holds a positive integer; 0 if none does."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _by_group(heads: int, groups: int, rows: int) -> FusedLayout | None:
    """For each group its queries, its key and its value."""
    if not heads or not groups or heads % groups:
        return None
    width = rows // (heads + 2 * groups)
    return FusedLayout(groups, (heads // groups * width, width, width))


def _in_order(heads: int, groups: int, rows: int) -> FusedLayout | None:
    """All queries, all keys, all values."""
    if not heads or not groups or heads % groups:
        return None
    width = rows // (heads + 2 * groups)
    return FusedLayout(1, (heads * width, groups * width, groups * width))


def _by_head(config: Config, rows: int) -> FusedLayout | None:
    heads = _number(config, *_HEADS)
    return _by_group(heads, heads, rows)


def _thirds(config: Config, rows: int) -> FusedLayout | None:
    return FusedLayout(1, (rows // 3,) * 3)


def _falcon(config: Config, rows: int) -> FusedLayout | None:
    """Falcon, and RefinedWeb as it was called in the beginning, which knew no "new" decoder."""
    heads = _number(config, *_HEADS)
    early = config.get("model_type") == "RefinedWeb"
    if config.get("new_decoder_architecture", early):
        return _by_group(heads, _number(config, *_KEY_HEADS) or heads, rows)
    shared = config.get("multi_query")
    return None if shared is None else _by_group(heads, 1 if shared else heads, rows)


def _internlm(config: Config, rows: int) -> FusedLayout | None:
    return _by_group(_number(config, *_HEADS), _number(config, *_KEY_HEADS), rows)


def _chatglm(config: Config, rows: int) -> FusedLayout | None:
    if not config.get("multi_query_attention"):
        return _by_head(config, rows)
    return _in_order(
        _number(config, "num_attention_heads"), _number(config, "multi_query_group_num"), rows
    )


def _big_code(config: Config, rows: int) -> FusedLayout | None:
    shared = config.get("multi_query")
    if shared:
        return _in_order(_number(config, *_HEADS), 1, rows)
    return None if shared is None else _by_head(config, rows)


def _codegen(config: Config, rows: int) -> FusedLayout | None:
    return FusedLayout(_CODEGEN_PARTS, (rows // (3 * _CODEGEN_PARTS),) * 3, "qvk")


def _latent_heads(config: Config, rows: int) -> FusedLayout | None:
    widths = (_number(config, "qk_nope_head_dim"), _number(config, "v_head_dim"))
    return FusedLayout(_number(config, "num_attention_heads"), widths, "kv")


def _latent_and_key(config: Config, rows: int) -> FusedLayout | None:
    widths = (_number(config, "kv_lora_rank"), _number(config, "qk_rope_head_dim"))
    return FusedLayout(1, widths, "lk")


def _gated_query(config: Config, rows: int) -> FusedLayout | None:
    heads = _number(config, "num_attention_heads")
    width = _number(config, "head_dim")
    return FusedLayout(heads, (width, width), "qg")


def _gated_delta(config: Config, rows: int) -> FusedLayout | None:
    keys = _number(config, "linear_num_key_heads")
    values = _number(config, "linear_num_value_heads")
    if not keys or values % keys:
        return None
    key = _number(config, "linear_key_head_dim")
    value = values // keys * _number(config, "linear_value_head_dim")
    return FusedLayout(keys, (key, key, value, value), "qkvg")


def _named(words: str) -> re.Pattern[str]:
    """A pattern for weights whose names end with the words."""
    return re.compile(rf"(?:^|\.){re.escape(words)}\.weight$")


#: Names of fused projections, whichever model has them.
_NAMES = re.compile(
    r"(?:^|\.)(?:query_key_value|qkv|Wqkv|wqkv|W_pack|qkv_proj|kv_b_proj|kv_a_proj_with_mqa"
    r"|c_attn|in_proj_qkvz|self\.in_proj)\.weight$"
)
#: Model types (all, where there are none), names of the fused tensor, how its layout is read.
_TABLE: tuple[tuple[str, re.Pattern[str], Reader], ...] = (
    ("gpt_neox gpt_neox_japanese persimmon bloom", _named("query_key_value"), _by_head),
    ("falcon RefinedWeb RefinedWebModel", _named("query_key_value"), _falcon),
    ("chatglm", _named("query_key_value"), _chatglm),
    ("internlm2 internlmxcomposer2", _named("wqkv"), _internlm),
    ("minimax", _named("self_attn.qkv_proj"), _by_head),
    ("deberta", _named("in_proj"), _by_head),
    ("gpt_bigcode", _named("attn.c_attn"), _big_code),
    ("qwen", _named("attn.c_attn"), _thirds),
    ("baichuan", _named("W_pack"), _thirds),
    ("codegen", _named("attn.qkv_proj"), _codegen),
    ("", _named("kv_b_proj"), _latent_heads),
    ("", _named("kv_a_proj_with_mqa"), _latent_and_key),
    ("qwen3_next", _named("in_proj_qkvz"), _gated_delta),
    ("qwen3_next qwen3_5_text qwen3_5_moe_text", _named("self_attn.q_proj"), _gated_query),
)
