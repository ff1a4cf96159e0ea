"""Experts of a pack, restored tensor by tensor when they are read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergesearch.merging.checkpoints.checkpoint import Checkpoint, read_tensor
from mergesearch.merging.checkpoints.digests import tensor_digests
from mergesearch.merging.checkpoints.model_config import read_config
from mergesearch.merging.checkpoints.pack_files import Pack, held_shapes
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import path_shown, shown, shown_names
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch

Held = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedCheckpoint(Checkpoint):
    """An expert of a pack, seen as any other checkpoint.

    Attributes:
        pack: Where it is from.
        model: The base.
        place: Its number in the pack.
    """

    pack: Pack
    model: Checkpoint
    place: int

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the weights depend on."""
        stored = {info.file.resolve() for info in self.pack.tensors.values()}
        return tuple(sorted({*stored, *self.model.files}))

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` as it comes back, rounded to its dtype."""
        import torch

        info = self._info(name)
        kept = self.model.aliases.get(name, name)
        form = self.pack.forms[kept]
        shapes = held_shapes(
            form, kept, info.shape, len(self.pack.experts), self.pack.rank, self.pack.directions
        )
        held = {key.partition("/")[0]: read_tensor(self.pack.tensors[key]) for key in shapes}
        return restored(form, self.model.read(kept), held, self.place).to(
            getattr(torch, info.dtype)
        )

    @cached_property
    def _fingerprint(self) -> str:
        below = self.model.fingerprint()
        if below != self.pack.base_fingerprint:
            raise CheckpointError(
                f"{path_shown(self.model.path)}: expected the base that "
                f"{path_shown(self.pack.folder)} was made with "
                f"({self.pack.base_fingerprint[:12]}), received {below[:12]}; restore it"
            )
        digests = sorted(tensor_digests(self.pack.tensors).items())
        text = json.dumps([below, self.place, self.name, digests])
        return hashlib.sha256(text.encode()).hexdigest()


def packed_expert(
    pack: Pack, name: str, model: Checkpoint, path: str, called: str, memo: Memo | None
) -> PackedCheckpoint:
    """An expert of a pack.

    Args:
        pack: The pack.
        name: Of the expert.
        model: The base.
        path: Where the expert was asked for.
        called: Its name in tables.
        memo: As for every checkpoint.

    Raises:
        CheckpointError: If there is no such expert, or the pack does not fit its base.
    """
    if name not in pack.names:
        raise CheckpointError(
            f"{path_shown(pack.folder)}: expected one of its experts ({shown_names(pack.names)}), "
            f"received {shown(name)}"
        )
    pack.check({n: i.shape for n, i in model.tensors.items() if n not in model.aliases})
    place = pack.names.index(name)
    dtypes = pack.experts[place].dtypes
    file = next(iter(pack.tensors.values())).file
    tensors = {}
    for one, info in model.tensors.items():
        dtype = dtypes.get(model.aliases.get(one, one), info.dtype)
        tensors[one] = TensorInfo(
            info.shape, dtype, file, 0, math.prod(info.shape) * ITEMSIZE[dtype]
        )
    folder = pack.folder / name
    config = read_config(folder)
    return PackedCheckpoint(
        called, path, folder, tensors, config, memo, pack=pack, model=model, place=place
    )


def restored(form: str, base: torch.Tensor, held: Held, place: int) -> torch.Tensor:
    """A tensor of an expert, in fp32 (fp64 where the base's is); not rounded where it need not be.

    Args:
        form: How it is held.
        base: The base's tensor.
        held: What is stored for it, by kind.
        place: Number of the expert.
    """
    import torch

    if form == "base":
        return base
    if form == "whole":
        return held["whole"][place]
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    if form == "masked":
        bits = np.unpackbits(held["mask"][place].numpy(), count=base.numel())
        chosen = torch.from_numpy(bits).bool().view(base.shape)
        # θ₀ + m_t ⊙ τ_MTL
        return base.to(wide) + held["sum"].to(wide).masked_fill(~chosen, 0.0)
    left = _side(held, "left", place, wide)
    right = _side(held, "right", place, wide)
    product = left @ (right if form == "factors" else right.T)
    return base.to(wide) + product.view(base.shape)


def _side(held: Held, side: str, place: int, wide: torch.dtype) -> torch.Tensor:
    """One factor of a task vector: as it is stored, or from mean and directions."""
    import torch

    if side in held:
        return held[side][place].to(wide)
    directions = held[f"{side}.directions"].to(wide)
    shares = held[f"{side}.shares"][:, :, place].to(wide)
    mean = held[f"{side}.mean"].to(wide)
    return torch.einsum("mpr,mp->mr", directions, shares).add_(mean)  # x_k = μ + Σ_p s_kp u_p
