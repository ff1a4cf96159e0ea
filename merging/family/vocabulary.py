"""Embeddings and output heads of different vocabularies, aligned by token string.

A tokenizer says which token each row belongs to. An :class:`Alignment` lists, for every row of the
merged vocabulary, the row of each source; rows that a source lacks are those of the base, so its
task vector is zero there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.tokenizer_folder import TOKENIZER_LIMIT
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.tokens import Tokens, read_tokens
from mergesearch.merging.foreign.reading import read_bytes
from mergesearch.merging.foreign.shown import path_shown, shown

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.checkpoints.checkpoint import Checkpoint

Rows = npt.NDArray[np.int64]

#: Tensors whose first dimension is the vocabulary: embeddings, output heads and their biases.
_VOCABULARY = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|shared"
    r"|lm_head|embed_out|(cls\.)?predictions(\.decoder)?|lm_head\.(decoder|out_proj)"
    r"|vocab_projector|generator_lm_head)\.(weight|bias)"
)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has a row for each token."""
    return _VOCABULARY.fullmatch(name) is not None


def check_same_tokens(sources: Sequence[Checkpoint]) -> str | None:
    """A warning about rows that hold other tokens in some sources, or None.

    There, merging rows by number mixes tokens.

    Sources without a ``tokenizer.json`` are left out, as are copies of the base's.

    Raises:
        CheckpointError: If a token that two sources have sits in different rows.
    """
    if not any(is_vocabulary(name) for name in sources[0].merged):
        return None
    folders = [
        (s, s.folder) for s in sources if s.folder and (s.folder / "tokenizer.json").is_file()
    ]
    if len({_content(folder / "tokenizer.json") for _, folder in folders}) <= 1:
        return None
    rows: dict[str, tuple[int, str]] = {}
    holders: dict[int, str] = {}
    renamed: list[str] = []
    for source, folder in folders:
        for token, row in sorted(read_tokens(folder).rows.items(), key=lambda pair: pair[1]):
            there, owner = rows.setdefault(token, (row, source.name))
            if there != row:
                raise CheckpointError(
                    f"{source.name!r} ({path_shown(source.path)}): expected token "
                    f"{shown(token)} in row {there}, as in {owner!r}, received row {row}; align "
                    "rows by token with special: {vocabulary: base | union | common}"
                )
            if holders.setdefault(row, token) != token:
                renamed.append(
                    f"row {row} is {shown(holders[row])} and {shown(token)} in {source.name!r}"
                )
    if not renamed:
        return None
    return (
        f"vocabulary: {len(renamed)} rows hold different tokens and are merged by row "
        f"({'; '.join(renamed[:3])}); "
        "special: {vocabulary: base | union | common} aligns them by token"
    )


def _content(file: Path) -> bytes:
    return read_bytes(file, TOKENIZER_LIMIT, CheckpointError)


@dataclass(frozen=True, eq=False)
class Alignment:
    """The merged vocabulary, row by row.

    Attributes:
        policy: As chosen: ``base``, ``union`` or ``common``.
        rows: For the base and each expert: its row ``(size,)`` for every merged row, -1 where it
            has none.
        ids: Token string -> merged row.
        new: Tokens that the base lacks, in the order of their rows.
        names: Aligned tensors.
        sizes: Rows of the base and each expert before.
    """

    policy: str
    rows: tuple[Rows, ...]
    ids: Mapping[str, int]
    new: tuple[str, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Rows of the merged vocabulary."""
        return len(self.rows[0])

    @property
    def digest(self) -> str:
        """Identity of the merged vocabulary and of what goes where."""
        digest = hashlib.sha256("\0".join([*self.ids, *self.names]).encode())
        for rows in self.rows:
            digest.update(rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def moves_base(self) -> bool:
        """Whether the base's own tensors change."""
        return not np.array_equal(self.rows[0], np.arange(self.sizes[0]))

    @property
    def renumbered(self) -> Mapping[int, int]:
        """Row of the base -> merged row, for those that are kept."""
        return {int(row): merged for merged, row in enumerate(self.rows[0]) if row >= 0}


def align_vocabularies(sources: Sequence[Checkpoint], policy: str) -> Alignment | None:
    """How the rows of base and experts match, or None if they are the same.

    Raises:
        CheckpointError: If a source has no tokenizer or no embedding, its tokenizer has rows that
            its embedding lacks, or no token is common to all.
    """
    sizes = [vocabulary_size(source) for source in sources]
    tokens = [_tokens_of(source, size) for source, size in zip(sources, sizes, strict=True)]
    if len(set(sizes)) == 1 and all(other.rows == tokens[0].rows for other in tokens):
        return None
    rows, ids, new = _LAYOUTS[policy](tokens, sizes)
    if not len(rows[0]):
        raise CheckpointError(
            "special.vocabulary: expected tokens that base and experts have in common, found none"
        )
    return Alignment(policy, rows, ids, new, _vocabulary_tensors(sources, sizes), tuple(sizes))


def vocabulary_size(source: Checkpoint) -> int:
    """Rows of the embeddings of a checkpoint.

    Raises:
        CheckpointError: If it has no embedding of tokens.
    """
    row_counts = [
        shape[0]
        for name, (shape, _) in source.merged.items()
        if len(shape) == 2 and is_vocabulary(name)
    ]
    if not row_counts:
        raise CheckpointError(
            f"{source.path}: expected embeddings of tokens to align, found none; leave "
            "special.vocabulary at same"
        )
    declared = [
        part.get("vocab_size") for part in (source.config, source.config.get("text_config") or {})
    ]
    return next((size for size in declared if size in row_counts), row_counts[0])


def _tokens_of(source: Checkpoint, size: int) -> Tokens:
    if source.folder is None:
        raise CheckpointError(
            f"{source.path}: expected a folder with a tokenizer to align rows by, received a file"
        )
    tokens = read_tokens(source.folder)
    if tokens.top > size:
        raise CheckpointError(
            f"{source.path}: expected a row for each of {tokens.top} tokens, received {size} rows"
        )
    return tokens


def _vocabulary_tensors(sources: Sequence[Checkpoint], sizes: Sequence[int]) -> tuple[str, ...]:
    """Names of the tensors to align.

    They are known by name; where sizes differ, every tensor with as many rows as each source's
    vocabulary is one, too.
    """
    differ = len(set(sizes)) > 1

    def is_one(name: str) -> bool:
        shapes = [source.merged[name][0] for source in sources if name in source.merged]
        fits = [
            len(shape) > 0 and shape[0] == size for shape, size in zip(shapes, sizes, strict=False)
        ]
        return len(shapes) == len(sources) and all(fits) and (differ or is_vocabulary(name))

    return tuple(name for name in sources[0].merged if is_one(name))


_Rows = tuple[tuple[Rows, ...], dict[str, int], tuple[str, ...]]


def _base_rows(tokens: Sequence[Tokens], sizes: Sequence[int]) -> _Rows:
    ids = dict(tokens[0].rows)
    return (np.arange(sizes[0]), *_expert_rows(tokens, ids, sizes[0])), ids, ()


def _union_rows(tokens: Sequence[Tokens], sizes: Sequence[int]) -> _Rows:
    """Tokens of the base, those it lacks by expert and row, and its rows without a token."""
    base = tokens[0]
    top = tokens[0].top
    others = (
        token
        for expert in tokens[1:]
        for token, _ in sorted(expert.rows.items(), key=lambda pair: pair[1])
    )
    new = tuple(dict.fromkeys(token for token in others if token not in base.rows))
    ids = {**base.rows, **{token: top + index for index, token in enumerate(new)}}
    own = np.concatenate([np.arange(top), np.full(len(new), -1), np.arange(top, sizes[0])])
    return (own, *_expert_rows(tokens, ids, len(own))), ids, new


def _common_rows(tokens: Sequence[Tokens], _sizes: Sequence[int]) -> _Rows:
    by_row = sorted(tokens[0].rows.items(), key=lambda pair: pair[1])
    kept = [
        (token, row) for token, row in by_row if all(token in expert.rows for expert in tokens[1:])
    ]
    ids = {token: row for row, (token, _) in enumerate(kept)}
    own = np.array([row for _, row in kept], dtype=np.int64)
    return (own, *_expert_rows(tokens, ids, len(own))), ids, ()


def _expert_rows(tokens: Sequence[Tokens], ids: Mapping[str, int], size: int) -> list[Rows]:
    aligned = [np.full(size, -1, dtype=np.int64) for _ in tokens[1:]]
    for rows, expert in zip(aligned, tokens[1:], strict=True):
        for token, row in ids.items():
            rows[row] = expert.rows.get(token, -1)
    return aligned


_LAYOUTS = {"base": _base_rows, "union": _union_rows, "common": _common_rows}


def aligned_base(
    alignment: Alignment, name: str, base: Checkpoint, experts: Sequence[Checkpoint]
) -> torch.Tensor:
    """The base's tensor in the merged vocabulary.

    Its own rows and, for new tokens, the average of the experts that have them.
    """
    import torch

    own = base.read(name)
    rows = torch.from_numpy(alignment.rows[0])
    out = own[rows.clamp(min=0)]
    added = torch.nonzero(rows < 0).flatten()
    if not len(added):
        return out
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    total = torch.zeros((len(added), *own.shape[1:]), dtype=wide)
    count = torch.zeros(len(added), dtype=wide)
    for expert, all_rows in zip(experts, alignment.rows[1:], strict=True):
        held = torch.from_numpy(all_rows)[added]
        total[held >= 0] += expert.read(name)[held[held >= 0]].to(wide)
        count += held >= 0
    out[added] = (total / count.view(-1, *[1] * (own.ndim - 1))).to(own.dtype)
    return out


def aligned_expert(
    alignment: Alignment, name: str, index: int, base: Checkpoint, experts: Sequence[Checkpoint]
) -> torch.Tensor:
    """An expert's tensor in the merged vocabulary.

    Its own rows for tokens of the base that it has, else the rows of the base.
    """
    import torch

    own = experts[index].read(name)
    origin = aligned_base(alignment, name, base, experts)
    out = origin.to(torch.promote_types(own.dtype, origin.dtype))
    first = torch.from_numpy(alignment.rows[0])
    rows = torch.from_numpy(alignment.rows[1 + index])
    taken = (first >= 0) & (rows >= 0)
    out[taken] = own[rows[taken]].to(out.dtype)
    return out


def with_vocabulary_size(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A model's configuration for a vocabulary of ``new`` rows instead of ``old``."""
    changed = dict(config)
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"] = with_vocabulary_size(changed["text_config"], old, new)
    if changed.get("vocab_size") == old:
        changed["vocab_size"] = new
    return changed
