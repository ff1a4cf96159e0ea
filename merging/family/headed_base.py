"""The base of a merge whose experts keep their own, with one head or what single experts have.

The counterpart of :mod:`mergesearch.merging.family.heads`, which takes heads out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.adapter_heads import HEAD_SETTINGS
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.family.aligned import Make, model_dtype, unstored, with_tensors
from mergesearch.merging.family.heads import BASE, Heads
from mergesearch.merging.tensors.layout import FLOATING

if TYPE_CHECKING:
    import torch

#: Settings of the language model in a model of several modalities: it is the part that is shared.
SHARED_SETTINGS = ("text_config", "decoder", "generator")


def headed_base(base: Checkpoint, heads: Heads, name: str) -> Checkpoint:
    """The base of a family with the head of a source in the place of its own.

    Its configuration is that of the source, with what policies changed in the base's. Heads are in
    the dtype of the model.

    Raises:
        InputError: If there is no such source.
    """
    head = heads.head(name)
    dtype = model_dtype(base)
    made = {n: _as_stored(base, head.source, n, dtype) for n in head.names}
    whole = with_tensors(
        base,
        made,
        config=headed_config(base, heads, name),
        copied=frozenset(head.names),
        done=f"head {name}",
        beside=[head.source],
    )
    gone = {*heads.names, *(a for a, kept in base.aliases.items() if kept in heads.names)}
    gone -= head.names
    if name != BASE:  # a model of another class has no place for tied copies of shared tensors
        gone |= {alias for alias in base.aliases if alias not in head.source.tensors}
    tensors = {n: info for n, info in whole.tensors.items() if n not in gone}
    return replace(whole, tensors=tensors, folder=head.source.folder)


def headed_config(base: Checkpoint, heads: Heads, name: str) -> dict[str, Any]:
    """The configuration of a source, with what policies changed in the base's."""
    changed = {k: v for k, v in base.config.items() if heads.base.config.get(k) != v}
    return {**heads.head(name).source.config, **changed}


def extended_base(base: Checkpoint, heads: Heads) -> Checkpoint:
    """The base of a family with the tensors that exactly one expert has, as they are.

    Its configuration has those experts' settings that the base lacks.
    """
    if not heads.added:
        return base
    made = {}
    config = dict(base.config)
    not_added = {*HEAD_SETTINGS, *SHARED_SETTINGS}
    for name, expert in heads.added.items():
        source = heads.of[expert].source
        info = source.tensors[name]
        made[name] = unstored(base, info.shape, info.dtype), partial(source.read, name)
        config = {
            **{key: v for key, v in source.config.items() if key not in not_added},
            **config,
        }
    return with_tensors(base, made, config=config, copied=frozenset(made), done="added")


def _as_stored(
    base: Checkpoint, source: Checkpoint, name: str, dtype: str
) -> tuple[TensorInfo, Make]:
    """A tensor of another source, floating ones in the dtype of the model."""
    info = source.tensors[name]
    kept = dtype if info.dtype in FLOATING else info.dtype

    def make() -> torch.Tensor:
        import torch

        return source.read(name).to(getattr(torch, kept))

    return unstored(base, info.shape, kept), make
