"""Checkpoints seen with other tensors than they store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.checkpoints.tied import is_carried
from mergesearch.merging.tensors.layout import natural_key

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.models.whole_model import WholeModel
    from mergesearch.merging.tensors.owned import Owned

Make = Callable[[], "torch.Tensor"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Aligned(Checkpoint):
    """A checkpoint seen with other tensors than it stores.

    Attributes:
        origin: What it is made from.
        made: Tensors that are made when they are read; ``tensors`` has their shapes and dtypes, but
            no bytes of a file.
        copied: Floating tensors that a merge copies from the base.
        done: What was done, for :attr:`identity`.
        beside: Other sources that the made tensors come from.
        renamed: Name -> the name that the origin has for it, where that is another.
        realigned: Made tensors that are the origin's own in other coordinates, and are compared
            with the base's as stored ones are.
        whole: The stored model that this is the shared part of, if it has a head of its own.
        owned: Tensor -> which units of its dimensions this source has, where layers hold units of
            several models; None where they do not.
    """

    origin: Checkpoint
    made: Mapping[str, Make] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()
    done: str = ""
    beside: tuple[Checkpoint, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    realigned: frozenset[str] = frozenset()
    whole: WholeModel | None = None
    owned: Callable[[str], Owned] | None = None

    @cached_property
    def merged(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Floating tensors that take part in a merge: name -> (shape, dtype)."""
        return {
            name: (info.shape, info.dtype)
            for name, info in self.tensors.items()
            if name not in self.aliases and name not in self.copied and not is_carried(name, info)
        }

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """Tensors that a merge copies from the base."""
        return tuple(
            name for name in self.tensors if name not in self.aliases and name not in self.merged
        )

    @property
    def identity(self) -> str:
        """Identity of the origin, of what was done to it, and of what that took."""
        parts = [
            self.done,
            *sorted(self.copied),
            *(source.identity for source in (self.origin, *self.beside)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the weights of the origin depend on."""
        return self.origin.files

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name``, made or stored.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        self._info(name)
        if name in self.made:
            return self.made[name]()
        return self.origin.read(self.name_in_origin(name))

    def name_in_origin(self, name: str) -> str:
        """What the origin calls a tensor that is not made."""
        return self.renamed.get(name, name)

    @cached_property
    def _fingerprint(self) -> str:
        # Of the weights as they are stored, which recipes speak of.
        return self.origin.fingerprint()


def stored_source(source: Checkpoint) -> Checkpoint:
    """The stored checkpoint that a source is seen from."""
    while isinstance(source, Aligned):
        source = source.origin
    return source


def before_realignment(source: Checkpoint) -> Checkpoint | None:
    """What a source was before its heads were brought to the base's; None if they were not."""
    origin = None
    while isinstance(source, Aligned):
        origin = source.origin if source.realigned else origin
        source = source.origin
    return origin


def stored_behind(source: Checkpoint, name: str) -> Checkpoint | None:
    """The stored checkpoint that has a tensor as the source has it; None where it is made."""
    while isinstance(source, Aligned):
        if name in source.made or name in source.renamed:
            return None
        source = source.origin
    return source


def with_tensors(
    source: Checkpoint,
    made: Mapping[str, tuple[TensorInfo, Make]],
    *,
    config: Mapping[str, Any] | None = None,
    copied: frozenset[str] = frozenset(),
    done: str = "",
    beside: Sequence[Checkpoint] = (),
    realigned: frozenset[str] = frozenset(),
    owned: Callable[[str], Owned] | None = None,
) -> Checkpoint:
    """The source with tensors added or replaced; the source itself if nothing changes."""
    if not made and config is None and not copied:
        return source
    return _seen(
        source,
        {**source.tensors, **{name: info for name, (info, _) in made.items()}},
        source.config if config is None else config,
        made={
            **(source.made if isinstance(source, Aligned) else {}),
            **{name: make for name, (_, make) in made.items()},
        },
        copied=copied | (source.copied if isinstance(source, Aligned) else frozenset()),
        done=done,
        beside=tuple(beside),
        realigned=realigned | (source.realigned if isinstance(source, Aligned) else frozenset()),
        owned=owned,
    )


def renamed(source: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The source with other names.

    Args:
        source: Any.
        names: New name -> name in the source; others stay.
    """
    seen = {old: new for new, old in names.items()}
    return _seen(
        source,
        {seen.get(name, name): info for name, info in source.tensors.items()},
        source.config,
        done=f"renamed {sorted(names.items())}",
        renamed=names,
    )


def _seen(
    source: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    **change: Any,
) -> Aligned:
    """The source with other tensors; ``change`` has the attributes that say what was done."""
    return Aligned(
        source.name,
        source.path,
        source.folder,
        {name: tensors[name] for name in sorted(tensors, key=natural_key)},
        config,
        source.memo,
        source.denoiser,
        origin=source,
        **change,
    )


def unstored(source: Checkpoint, shape: Sequence[int], dtype: str) -> TensorInfo:
    """The info of a tensor that is in no file.

    Its size is that of the bytes that it will take.
    """
    file = next(iter(source.tensors.values())).file
    return TensorInfo(tuple(shape), dtype, file, 0, math.prod(shape) * ITEMSIZE[dtype])


def model_dtype(base: Checkpoint) -> str:
    """The widest dtype of the tensors that are merged, in which the model is loaded."""
    return max((dtype for _, dtype in base.merged.values()), key=lambda name: ITEMSIZE[name])
