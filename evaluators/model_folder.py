"""Writes the resident model as a folder that other programs load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch

#: Files beside a checkpoint that say how text or images become inputs.
COMPANIONS = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)


def save_model(model: Any, folder: Path, tokenizer: str | None) -> None:
    """Write a model as ``transformers`` loads it, with the tokenizer files of a checkpoint.

    Args:
        model: A ``transformers`` model.
        folder: Where to write it.
        tokenizer: Path of the checkpoint whose tokenizer files are copied; None copies none.
    """
    from mergesearch.merging.models.loading import no_progress_bar

    # Bound parameters share one buffer, which save_pretrained takes for tied weights. Copies are
    # apart from each other, except where weights are truly tied.
    copies: dict[object, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        memory = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
        state[name] = copies.setdefault(memory, tensor.detach().clone())
    with no_progress_bar():
        model.save_pretrained(folder, state_dict=state)
    if tokenizer is None:
        return
    source = Path(tokenizer) if Path(tokenizer).is_dir() else open_checkpoint(tokenizer).folder
    files = set() if source is None else {f for name in COMPANIONS for f in source.glob(name)}
    for file in sorted(files):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
