"""Digests of what modules are called with, to know an earlier call again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import nn

#: What a digest takes by its text.
_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


class CallDigests:
    """Digests of 128 bits within one forward pass; every tensor is read once."""

    def __init__(self) -> None:
        # The tensors are held, so that no id is given again.
        self._known: dict[int, tuple[torch.Tensor, bytes]] = {}

    def of(self, *values: Any) -> bytes | None:
        """The digest of tensors, plain values, and lists and mappings of them.

        None where there is anything else among them, such as a cache of keys and values.
        """
        digest = xxhash.xxh3_128()
        return digest.digest() if self._add(digest, values) else None

    def tensors_are_unchanged(self) -> bool:
        """Whether all tensors still hold what they held when they were first read."""
        return all(tensor_digest(tensor) == known for tensor, known in self._known.values())

    def _add(self, digest: xxhash.xxh3_128, value: Any) -> bool:
        """Add a value; False where it cannot be."""
        if value is None or isinstance(value, _PLAIN):
            digest.update(f"{type(value).__name__} {value!r};".encode())
            return True
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided:
            digest.update(self._of_tensor(value))
            return True
        if type(value) in (list, tuple):
            digest.update(f"{type(value).__name__} of {len(value)};".encode())
            return all(self._add(digest, each) for each in value)
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            digest.update(f"{len(value)} items;".encode())
            return all(self._add(digest, pair) for pair in value.items())
        return False

    def _of_tensor(self, tensor: torch.Tensor) -> bytes:
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = (tensor, tensor_digest(tensor))
        return known[1]


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """The digest of a tensor's elements, and of how they lie in memory."""
    head = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), str(tensor.device))
    digest = xxhash.xxh3_128(repr(head).encode())
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
