"""Results on disk that several hyperparameters of an operator share.

A memo is a folder of safetensors files, each named by what it was made from. Files appear under
their name only when they are whole, and carry a checksum that is compared when they are read; a
damaged one is made again, and so is one for which the disk had no room.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


Tensors = Mapping[str, "torch.Tensor"]

#: Bytes that a tensor of torch's own begins on a multiple of; BLAS may sum others in another order.
ALIGNMENT = 64


@dataclass(frozen=True)
class Memo:
    """A folder of prepared intermediate results; several processes may use it at once.

    Attributes:
        folder: Created when first written.
    """

    folder: Path

    def get(self, key: Sequence[Any], compute: Callable[[], Tensors]) -> Tensors:
        """The tensors that ``compute`` gives in main memory, from disk if they were there before.

        ``key`` says what they depend on (JSON-able).
        """
        text = json.dumps(key, sort_keys=True, default=repr)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        tensors = _load(path)
        if tensors is not None:
            mark_used(path)
        else:
            tensors = laid_out({name: tensor.cpu() for name, tensor in compute().items()})
            _save(tensors, path)
        return tensors


def laid_out(tensors: Tensors) -> Tensors:
    """The tensors row by row in aligned memory, wherever they come from.

    Products of them have the same bits then, whether they were just made or were read from disk.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {
        name: tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
        for name, tensor in plain.items()
    }


def mark_used(path: Path) -> None:
    """Let the time of access of a file say when it was last used, so that others can be removed.

    File systems are often mounted so that reading alone does not.
    """
    with suppress(OSError):  # a folder that may only be read
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _load(path: Path) -> Tensors | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()  # no mapping: it cannot be iterated over
            tensors = {name: file.get_tensor(name) for name in names}
            expected = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return None
    return laid_out(tensors) if _checksum(tensors) == expected else None


def _save(tensors: Tensors, path: Path) -> None:
    """Keep tensors where that is possible; a full disk costs time later, but no trial."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(3).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), str(part), metadata={"checksum": _checksum(tensors)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError):
        pass  # the tensors are at hand
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _checksum(tensors: Tensors) -> str:
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
