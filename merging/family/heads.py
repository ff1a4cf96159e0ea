"""Heads that line up in no merge: each expert's own, the base's, or the average of the experts'.

Where each source keeps its own, the shared part alone is merged: heads are in no layout, and no
operator sees them. :func:`headed_base` puts one head beside the shared part again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.family.aligned import Make, unstored, with_tensors
from mergesearch.merging.family.head_names import (
    Shapes,
    classifier_heads,
    label_count,
    labels_differ,
    odd_heads,
    refuse_other_depths,
    refuse_uneven,
    tied_apart,
)
from mergesearch.merging.family.messages import listed
from mergesearch.merging.family.missing_tensors import (
    HEAD_SETTINGS,
    made_of,
    with_heads_of,
)
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import FLOATING
from mergesearch.merging.tensors.source import shapes_of

if TYPE_CHECKING:
    import torch

#: Settings of the language model in a model of several modalities: it is the part that is shared.
SHARED_SETTINGS = ("text_config", "decoder", "generator")
#: The head of the base, where no expert has that name.
BASE = "base"


@dataclass(frozen=True, eq=False)
class Head:
    """What one source has of its own.

    Attributes:
        source: The source as it is stored.
        names: Its tensors that no other source takes part in; none where it has the shared part
            alone.
        renamed: Name of a shared tensor -> what the source calls it, where that is something else.
    """

    source: Checkpoint
    names: frozenset[str]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of floating elements."""
        infos = (self.source.tensors[name] for name in self.names)
        return sum(prod(info.shape) for info in infos if info.dtype in FLOATING)


@dataclass(frozen=True, eq=False)
class Heads:
    """What the sources of a merge have of their own.

    Attributes:
        base: The base as it is stored.
        names: All tensors that are not shared.
        of: Name of an expert, or :data:`BASE` -> its head.
        added: Tensors that an export adds to the base's -> the one expert that has them.
        chosen: The head that a whole model is written with; None where each is written by itself.
    """

    base: Checkpoint
    names: frozenset[str]
    of: Mapping[str, Head]
    added: Mapping[str, str] = field(default_factory=dict)
    chosen: str | None = None

    @property
    def apart(self) -> dict[str, Head]:
        """The heads that are written beside the shared part; the base's own is inside it."""
        return {
            name: head
            for name, head in self.of.items()
            if head.names and head.source is not self.base
        }

    def head(self, name: str) -> Head:
        """The head of an expert.

        Raises:
            InputError: If there is no such expert.
        """
        if name not in self.of:
            raise InputError(f"head: expected one of {', '.join(self.of)}, received {name!r}")
        return self.of[name]


def own_heads(
    sources: Sequence[Checkpoint],
    policies: TensorPolicies,
    renamed: Sequence[Mapping[str, str]],
) -> Heads | None:
    """What every source keeps for itself under the policies; None where nothing is.

    Args:
        sources: Base and experts, with the names of the base.
        policies: ``heads: own``, ``absent: own``, or both.
        renamed: Of each source: name -> its own name.

    Raises:
        CheckpointError: If sources have other depths.
    """
    shapes = [shapes_of(source) for source in sources]
    tied = tied_apart(sources)
    names: set[str] = set()
    added: dict[str, str] = {}
    if policies.heads == "own":
        names |= odd_heads(shapes, tied)
        if labels_differ(sources[0], sources[1:]):
            names |= _classifiers(sources, shapes)
    if policies.absent == "own":
        new = {n for own in shapes[1:] for n in own if n not in shapes[0] and n not in tied}
        refuse_other_depths(new, shapes, "special.absent: own")
        names |= new
    if not names:
        return None
    of = {
        source.name: Head(source, _own_names(source, names), own)
        for source, own in zip(sources[1:], renamed[1:], strict=True)
    }
    if policies.absent == "own":
        added = _of_one_expert(sources[0], of)
    of.setdefault(BASE, Head(sources[0], _own_names(sources[0], names)))
    return Heads(sources[0], frozenset(names), of, added)


def without(sources: Sequence[Checkpoint], names: Collection[str]) -> list[Checkpoint]:
    """The sources with tensors that no merge acts on."""
    return [with_tensors(source, {}, copied=frozenset(names)) for source in sources]


def with_base_heads(sources: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The sources with the base's heads, whatever the experts have.

    Raises:
        CheckpointError: If the base has none.
    """
    names = _heads_of(sources)
    base = sources[0]
    if names and not names & {*base.merged}:
        raise CheckpointError(
            f"special.heads: base: expected a head in base {base.name!r} ({base.path}), received "
            f"none; the experts have {listed(names)}: set heads: own or average"
        )
    return without(sources, names)


def with_average_heads(sources: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The sources with the average of the experts' heads, whatever the coefficients.

    Heads that the base alone has are kept.

    Raises:
        CheckpointError: If the experts' heads do not line up.
    """
    names = _heads_of(sources)
    base = sources[0]
    experts = sources[1:]
    averaged = sorted(name for name in names if any(name in e.merged for e in experts))
    for name in averaged:
        shapes = {str([*e.merged[name][0]]) if name in e.merged else "none" for e in experts}
        refuse_uneven(name, shapes)
    made = {name: _averaged(base, experts, name) for name in averaged}
    other = any(base.merged.get(n, ((),))[0] != experts[0].merged[n][0] for n in averaged)
    config = with_heads_of(base, experts) if other else None
    first = with_tensors(base, made, config=config, done="heads average", beside=experts)
    return without([first, *experts], names)


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


def model_dtype(base: Checkpoint) -> str:
    """The widest dtype of the tensors that are merged, in which the model is loaded."""
    return max((dtype for _, dtype in base.merged.values()), key=lambda name: ITEMSIZE[name])


def _heads_of(sources: Sequence[Checkpoint]) -> set[str]:
    shapes = [shapes_of(source) for source in sources]
    return odd_heads(shapes, tied_apart(sources)) | _classifiers(sources, shapes)


def _classifiers(sources: Sequence[Checkpoint], shapes: Sequence[Shapes]) -> set[str]:
    return classifier_heads(shapes, [label_count(source.config) for source in sources])


def _own_names(source: Checkpoint, names: Collection[str]) -> frozenset[str]:
    """Those of the names that a source has, and the integers of their modules."""
    own = {name for name in source.merged if name in names}
    modules = {name.rpartition(".")[0] for name in own} - {""}
    return frozenset({*own, *(n for n in source.carried if n.rpartition(".")[0] in modules)})


def _of_one_expert(base: Checkpoint, of: Mapping[str, Head]) -> dict[str, str]:
    """Tensors that the base lacks and exactly one expert has -> that expert."""
    owners: dict[str, list[str]] = {}
    for expert, head in of.items():
        for name in head.names:
            if name not in base.tensors:
                owners.setdefault(name, []).append(expert)
    return {name: experts[0] for name, experts in owners.items() if len(experts) == 1}


def _averaged(
    base: Checkpoint, experts: Sequence[Checkpoint], name: str
) -> tuple[TensorInfo, Make]:
    shape = experts[0].merged[name][0]
    dtype = base.merged[name][1] if name in base.merged else model_dtype(base)
    return unstored(base, shape, dtype), made_of(experts, name, "average", dtype)


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


def silent_heads(sources: Sequence[Checkpoint], policies: TensorPolicies) -> str | None:
    """A warning about classifiers of other label sets that are merged as any other tensor."""
    if policies.heads != "refuse" or not labels_differ(sources[0], sources[1:]):
        return None
    shapes = [shapes_of(source) for source in sources]
    names = _classifiers(sources, shapes)
    if not names or any(not names <= own.keys() for own in shapes):
        return None
    return (
        f"label sets (id2label) differ, and the heads {listed(names)} are merged as if they did "
        "not; keep each expert's with special: {heads: own}"
    )
