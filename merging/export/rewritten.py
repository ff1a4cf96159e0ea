"""A model folder with other weights of the same names, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.companions import copy_companions
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.foreign.paths import resolved

if TYPE_CHECKING:
    import torch

#: Size above which weights are split over several files.
SHARD_BYTES = 5_000_000_000


def write_rewritten(
    source: Checkpoint,
    out: Path,
    read: Callable[[str], torch.Tensor],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Write a folder like that of ``source``, whose tensors ``read`` gives; its bytes of weights.

    Configuration, tokenizer and licence are copied. The folder appears under its name only when
    everything is on disk and ``check`` has let it pass.

    Args:
        source: What names, shapes and dtypes are taken from.
        out: Folder to create; may exist if it is empty.
        read: Gives the tensor of a name, in any floating dtype.
        overwrite: Replace a folder that is not empty.
        shard_bytes: Size above which the weights are split over several files.
        check: Looks at the finished folder before it gets its name.

    Raises:
        InputError: If ``out`` cannot be written, or is in use.
    """
    target = resolved(out)
    check_target(target, [source], overwrite)
    size = sum(info.stop - info.start for info in source.tensors.values())
    try:
        with new_folder(target) as part:
            _write(source, part, read, shard_bytes)
            check(part)
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write {size / 1e9:.2g} GB, received: "
            f"{error.strerror or error}"
        ) from error
    return size


def _write(
    source: Checkpoint, part: Path, read: Callable[[str], torch.Tensor], shard_bytes: int
) -> None:
    import torch

    laid_out = lay_out_files(part, source.tensors, shard_bytes)
    for name, info in laid_out.items():
        write_tensor(info, read(name).to(getattr(torch, info.dtype)))
    if source.folder is not None:
        copy_companions(source.folder, part)
