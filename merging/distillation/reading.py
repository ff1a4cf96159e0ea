"""What models predict on texts, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in
from mergesearch.merging.distillation.predictions import Predictions
from mergesearch.merging.distillation.tokenized import (
    Tokenized,
    check_fast,
    first_token,
    tokenize,
)
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.shown import path_shown

if TYPE_CHECKING:
    import torch

#: Tokens of a forward pass, padding included, where a text has not more.
BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Reader:
    """A language model that is read on texts.

    Attributes:
        path: Of its checkpoint.
        checkpoint: Opened; its weights are not read.
        tokenizer: Of its folder.
        first: Token before every text.
        most: Tokens of a text that it has room for.
    """

    path: str
    checkpoint: Checkpoint
    tokenizer: Any
    first: int
    most: int


def open_reader(path: str, length: int) -> Reader:
    """Open a model and its tokenizer, without its weights.

    Args:
        path: Folder, ``org/name@revision`` or ``MODEL+ADAPTER``.
        length: Tokens of a text at most.

    Raises:
        CheckpointError: If there is no such model.
        InputError: If its tokenizer does not tell the place of its tokens.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.folder is None:
        raise InputError(
            f"{path_shown(path)}: expected a folder with a tokenizer, received a single file; "
            "name the model's folder"
        )
    where = path_shown(path)
    tokenizer = tokenizer_in(checkpoint.folder, where)
    check_fast(tokenizer, where)
    config = checkpoint.config
    room = config.get("max_position_embeddings") or config.get("n_positions") or length + 1
    most = min(length, int(room) - 1)
    return Reader(path, checkpoint, tokenizer, first_token(tokenizer, where), most)


def tokenized(reader: Reader, texts: Sequence[str]) -> list[Tokenized]:
    """The tokens of texts, as a model reads them."""
    return [tokenize(reader.tokenizer, text, reader.most) for text in texts]


def predictions(reader: Reader, texts: Sequence[Tokenized], kept: int) -> list[Predictions]:
    """What a model expects at each token of each text, the ``kept`` most probable.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """
    import torch

    from mergesearch.merging.models.loading import load_model

    model: Any = load_model(reader.path, "AutoModelForCausalLM")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    order = sorted(range(len(texts)), key=lambda one: len(texts[one].ids))
    found: list[Predictions | None] = [None] * len(texts)
    for batch in _batches(order, [len(text.ids) for text in texts]):
        rows = _expected(model, reader.first, [texts[one] for one in batch], kept)
        for one, row in zip(batch, rows, strict=True):
            found[one] = row
    return [row for row in found if row is not None]


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Texts, sorted by length, in batches of at most ``BATCH_TOKENS`` padded tokens."""
    batches: list[list[int]] = [[]]
    for one in order:
        if batches[-1] and (len(batches[-1]) + 1) * (lengths[one] + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(one)
    return [batch for batch in batches if batch]


def _expected(model: Any, first: int, texts: Sequence[Tokenized], kept: int) -> list[Predictions]:
    """Predictions of a batch of texts."""
    import torch

    device = next(model.parameters()).device
    ids, mask = padded([[first, *text.ids[:-1].tolist()] for text in texts])
    with torch.inference_mode():
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits.float()
        top = torch.softmax(logits, dim=-1).topk(min(kept, logits.shape[-1]), dim=-1)
        shares = (top.values / top.values.sum(dim=-1, keepdim=True)).cpu().numpy()
        tokens = top.indices.cpu().numpy()
    return [
        Predictions(tokens[row, :count], shares[row, :count], np.ones(count, dtype=bool))
        for row, count in enumerate(len(text.ids) for text in texts)
    ]


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids padded with 0 on the right, and 1 where a token stands ``(rows, longest)``."""
    import torch

    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    ones = [torch.ones_like(row) for row in tensors]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
