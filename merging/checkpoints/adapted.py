"""Checkpoints of a model with a LoRA adapter: ``MODEL+ADAPTER``, or the adapter's folder alone.

The low-rank changes stay factors: a task vector relative to the adapter's own model is exactly
``scale · B · A``, with no rounding through base + change − base, and operators that can keep it as
factors never form it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.adapter_files import AdapterFiles, LowRank, listed
from mergesearch.merging.checkpoints.adapter_heads import (
    HeadedModel,
    relabelled,
    saved_heads,
    with_saved_heads,
)
from mergesearch.merging.checkpoints.checkpoint import Checkpoint, read_tensor
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo, hash_bytes
from mergesearch.merging.checkpoints.skeleton import Skeleton
from mergesearch.merging.checkpoints.tied import ties_embeddings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import cut, path_shown, shown
from mergesearch.merging.kernels.lowrank import matrix_shape, product

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.source import TensorSource

Pair = tuple["torch.Tensor", "torch.Tensor"]

#: Model types of which some modules store their matrices as (in, out) and others as (out, in).
_MIXED = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A stored model with an adapter applied to it, tensor by tensor when asked.

    Seen as any other checkpoint: ``tensors`` are those of the model, except that tensors which the
    adapter stores whole are the adapter's. With a head that the model lacks, they are those of the
    class that was adapted. :meth:`read` gives adapted matrices in fp32 (fp64 where the model's
    are), not rounded to the model's dtype.

    Attributes:
        model: The model below the adapter.
        adapter: The adapter's files.
        changes: Low-rank changes by stored name, and whether the stored matrix is ``(in, out)``.
        stored_as: Name of a tensor -> what a checkpoint of the adapted class calls it, where that
            is another.
    """

    model: Checkpoint
    adapter: AdapterFiles
    changes: Mapping[str, tuple[LowRank, bool]]
    stored_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the weights depend on."""
        return tuple(sorted({*self.model.files, *(file.resolve() for file in self.adapter.files)}))

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the tensors of modules that the adapter stores whole."""
        return tuple(name for name in self._replaced if self.adapter.is_saved(name))

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes or replaces."""
        return tuple(
            name for name in self.tensors if name in self.changes or name in self._replaced
        )

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` with the adapter applied."""
        origin = super().read(name)
        change = self._product(name)
        return origin if change is None else origin.to(change.dtype) + change.view(origin.shape)

    def factors(self, name: str) -> Pair | None:
        """The low-rank change of a tensor, seen as a matrix of first dimension by all others.

        Returns:
            ``(m, r)``, which holds the scale, and ``(r, n)``, both fp32; None if there is no
            low-rank change.
        """
        if name not in self.changes:
            return None
        change, transposed = self.changes[name]
        down, up = (_matrix(read_tensor(info)) for info in (change.down, change.up))
        left, right = (down.T, up.T) if transposed else (up, down)
        # Scaled in fp64 and rounded once: α/√r is no number of fp32.
        return (left.double() * change.scale).float(), right.float().contiguous()

    def low_rank(self, name: str, base: TensorSource) -> Pair | None:
        """The task vector of a tensor as factors, of rank 0 where it is zero.

        None if it has to be read whole.
        """
        import torch

        if not self._starts_from(name, base):
            return None
        m, n = matrix_shape(self.shape(name))
        return self.factors(name) or (torch.zeros(m, 0), torch.zeros(0, n))

    def delta(self, name: str, base: TensorSource) -> torch.Tensor | None:
        """The exact task vector of a tensor where it is the adapter's change alone, else None."""
        if name not in self.changes or not self._starts_from(name, base):
            return None
        change = self._product(name)
        return None if change is None else change.view(self.shape(name))

    @cached_property
    def _fingerprint(self) -> str:
        changes = [
            [
                name,
                change.scale,
                transposed,
                [[i.dtype, *i.shape, hash_bytes(i)] for i in (change.down, change.up)],
            ]
            for name, (change, transposed) in sorted(self.changes.items())
        ]
        whole = [
            [name, i.dtype, list(i.shape), hash_bytes(i)]
            for name, i in sorted(self._replaced.items())
        ]
        below = _fingerprint_of(self.model)
        return hashlib.sha256(json.dumps([below, changes, whole]).encode()).hexdigest()

    @cached_property
    def _replaced(self) -> dict[str, TensorInfo]:
        return {
            name: info
            for name, info in self.tensors.items()
            if info is not self.model.tensors.get(name)
        }

    def _starts_from(self, name: str, base: TensorSource) -> bool:
        """Whether the base holds the very tensor that the change is added to."""
        import torch

        if type(base) is Checkpoint and _same_bytes(base.tensors.get(name), self.tensors[name]):
            return True
        ours = super().read(name)
        theirs = base.read(name)
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))

    def _product(self, name: str) -> torch.Tensor | None:
        """The low-rank change as a matrix, in fp32 (fp64 where the model's tensor is)."""
        import torch

        pair = self.factors(name)
        if pair is None:
            return None
        wide = torch.float64 if self.tensors[name].dtype == "float64" else torch.float32
        return product(pair[0].to(wide), pair[1].to(wide))


@dataclass(frozen=True, eq=False)
class AdaptedTensors:
    """What an adapter makes of its model.

    Attributes:
        tensors: All tensors by stored name.
        changes: Low-rank changes by stored name, and whether the stored matrix is ``(in, out)``.
        config: Configuration of the adapted model.
        stored_as: As in :class:`AdaptedCheckpoint`.
    """

    tensors: Mapping[str, TensorInfo]
    changes: Mapping[str, tuple[LowRank, bool]]
    config: Mapping[str, Any]
    stored_as: Mapping[str, str]


def adapted_tensors(model: Checkpoint, adapter: AdapterFiles) -> AdaptedTensors:
    """What an adapter makes of its model.

    Raises:
        CheckpointError: If a tensor has no home in the model, or another shape than the model's, or
            a weight beside an adapter's head is stored nowhere.
    """
    heads = saved_heads(model, adapter)
    headed = with_saved_heads(model, adapter, heads) if heads else None
    changes, whole = _Homes(model, adapter, frozenset(heads), headed).find()
    if headed is None:
        tensors = {**model.tensors, **whole}
        return AdaptedTensors(tensors, changes, relabelled(model, adapter), {})
    kept = {name: info for name, info in model.tensors.items() if name not in headed.dropped}
    return AdaptedTensors({**kept, **whole}, changes, headed.config, headed.stored_as)


@dataclass(frozen=True)
class _Homes:
    """Where the tensors of an adapter belong in its model, known by name.

    Attributes:
        model: Below the adapter.
        adapter: Its files.
        heads: Whole tensors that the model need not have.
        headed: The model with these, if there are any.
    """

    model: Checkpoint
    adapter: AdapterFiles
    heads: frozenset[str]
    headed: HeadedModel | None

    def find(self) -> tuple[dict[str, tuple[LowRank, bool]], dict[str, TensorInfo]]:
        """Low-rank changes with their orientation, and whole tensors, both by stored name."""
        low_rank = {f"{change.module}.weight": change for change in self.adapter.low_rank}
        homes = self._stored_names({*low_rank, *self.adapter.whole})
        self._check_ties(homes)
        changes = {
            homes[name]: (change, self._is_transposed(change, homes[name]))
            for name, change in low_rank.items()
        }
        return changes, {homes[name]: info for name, info in self.adapter.whole.items()}

    def _stored_names(self, names: Collection[str]) -> dict[str, str]:
        """Name in memory -> stored name.

        They are the same if there is one, else related by transformers' own renaming.
        """
        homes = {name: name for name in names if name in self.model.tensors}
        if len(homes) < len(names) and self.skeleton is not None:
            in_memory = self.skeleton.names_in_memory([*self.model.tensors, *names])
            stored = {in_memory[name].name: name for name in self.model.tensors}
            renamed = {
                n: stored[in_memory[n].name]
                for n in names
                if n not in homes and in_memory[n].name in stored
            }
            fused = [name for name, home in renamed.items() if in_memory[home].is_part]
            if fused:
                raise self._misfit(f"parameters that are stored in parts: {listed(fused)}")
            homes |= renamed
        homes |= {name: name for name in names if name in self.heads and name not in homes}
        lost = [name for name in names if name not in homes]
        if lost:
            raise self._misfit(f"tensors that the model does not store: {listed(lost)}")
        if len(set(homes.values())) < len(homes):
            raise self._misfit(f"two changes of one tensor: {listed(homes)}")
        return homes

    def _is_transposed(self, change: LowRank, stored: str) -> bool:
        """Whether the model stores the matrix of a change as ``(in, out)``."""
        shape = self.model.shape(stored)
        up = change.up.shape[0]
        down = change.down.shape[1:]
        straight = not change.embedding and (up, *down) == shape
        turned = len(down) == 1 and (*down, up) == shape
        if not straight and not turned:
            raise self._misfit(
                f"a change of {shown(change.module)} from {cut(str(list(down)), 40)} to {up} "
                f"features for {cut(str(list(shape)), 40)}"
            )
        if straight and turned:  # a square matrix does not tell
            return self._stores_transposed(change.module)
        return turned

    def _stores_transposed(self, module: str) -> bool:
        if self.model.config.get("model_type") in _MIXED and self.skeleton is not None:
            return self.skeleton.is_transposed(f"{module}.weight")
        return self.adapter.transposed

    def _check_ties(self, homes: Mapping[str, str]) -> None:
        """Refuse a change of one of two tied tensors.

        Peft leaves the other as it was, which a merged model cannot.
        """
        if not ties_embeddings(self.model.config):
            return
        shared = {*self.model.aliases, *self.model.aliases.values()}
        vocabulary = _vocabulary(self.model.config)
        for name, stored in homes.items():
            if name in self.heads:
                continue
            if stored in shared or (
                self.model.shape(stored)[:1] == (vocabulary,) and self._is_tied(name)
            ):
                raise self._misfit(
                    f"a change of {shown(name)}, which the model ties to another tensor"
                )

    def _is_tied(self, name: str) -> bool:
        return self.skeleton is None or bool(self.skeleton.tied_to(name))

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The model without weights; built when asked for, since that takes seconds."""
        return Skeleton.of(self.model.config) if self.headed is None else self.headed.skeleton

    def _misfit(self, received: str) -> CheckpointError:
        return CheckpointError(
            f"{path_shown(self.adapter.folder)}: expected an adapter of "
            f"{path_shown(self.model.path)}, received "
            f"{received}; choose the model that it was trained on, or merge it into that with peft "
            "(merge_and_unload) and save the result"
        )


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    size: int | None = (config.get("text_config") or config).get("vocab_size")
    return size


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(matrix_shape(tensor.shape))


def _same_bytes(one: TensorInfo | None, other: TensorInfo) -> bool:
    if one is None or (one.shape, one.dtype, one.start) != (other.shape, other.dtype, other.start):
        return False
    return one.file.resolve() == other.file.resolve()


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


_FINGERPRINTS: dict[tuple[object, ...], str] = {}


def _fingerprint_of(model: Checkpoint) -> str:
    """The fingerprint of a model that many adapters share.

    It is hashed once, as long as its files do not change.
    """
    key = (model.path, *map(_stamp, model.files))
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = model.fingerprint()
    return _FINGERPRINTS[key]
