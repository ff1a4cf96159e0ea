"""How fast the product brings an arena from a file to the card, beside a plain pinned copy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.gpu_check.check import Figure, Machine
from mergesearch.merging.resident.upload import copy_bytes

#: Bytes of the file at full scale, and the share of a card that they may take.
BYTES = 4e9
SHARE = 0.4
ROUNDS = 3


def run(machine: Machine) -> Sequence[Figure]:
    """The content that arrives, and the speed."""
    size = machine.at_most(BYTES, SHARE)
    path = machine.folder / "upload.bin"
    write_random(path, size)
    try:
        return _measured(machine, np.memmap(path, np.uint8, "r"))
    finally:
        path.unlink()


def write_random(path: Path, size: int, chunk: int = 1 << 26) -> None:
    """A file of random bytes."""
    generator = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, chunk):
            file.write(generator.bytes(min(chunk, size - start)))


def _measured(machine: Machine, source: np.memmap[tuple[int], np.dtype[np.uint8]]) -> list[Figure]:
    size = len(source)
    target = torch.empty(size, dtype=torch.uint8, device=machine.device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=machine.is_card)
    pinned.numpy()[:] = source
    uploads = []
    copies = []
    for _ in range(ROUNDS):
        copies.append(machine.seconds_of(lambda: target.copy_(pinned, non_blocking=True)))
        target.zero_()
        uploads.append(machine.seconds_of(lambda: copy_bytes(source, target)))
    equal = torch.equal(target.cpu(), pinned)
    upload = size / statistics.median(uploads)
    copy = size / statistics.median(copies)
    return [
        Figure(
            f"{size / 1e9:.3g} GB from a file in the page cache",
            f"{upload / 1e9:.1f} GB/s, {upload / copy:.0%} of a pinned copy "
            f"({copy / 1e9:.1f} GB/s)",
        ),
        Figure("bytes that arrive", "the file's" if equal else "others", "the file's", equal),
    ]
