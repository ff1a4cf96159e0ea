"""Heads that line up in no merge: each expert's own, the base's, or the average of the experts'.

Where each source keeps its own, the shared part alone is merged: heads are in no layout, and no
operator sees them. :func:`headed_base` puts one head beside the shared part again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.family.aligned import (
    Aligned,
    Make,
    model_dtype,
    stored_source,
    unstored,
    with_tensors,
)
from mergesearch.merging.family.head_names import (
    Shapes,
    classifier_heads,
    label_count,
    labels_differ,
    labels_of,
    odd_heads,
    refuse_other_depths,
    refuse_uneven,
    tied_apart,
)
from mergesearch.merging.family.messages import listed
from mergesearch.merging.family.missing_tensors import made_of, with_heads_of
from mergesearch.merging.models.whole_model import WholeModel
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import FLOATING
from mergesearch.merging.tensors.source import shapes_of

if TYPE_CHECKING:
    pass

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

    def without_head(self, experts: Sequence[Checkpoint]) -> list[str]:
        """Names of the experts that have nothing of their own."""
        return [expert.name for expert in experts if not self.of[expert.name].names]

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
        if labels_differ(sources[0], sources[1:]) or any(map(_trained_apart, sources)):
            names |= _classifiers(sources, shapes)
    if policies.absent == "own":
        new = {n for own in shapes[1:] for n in own if n not in shapes[0] and n not in tied}
        refuse_other_depths(new, shapes, "special.absent: own")
        names |= new
    if not names:
        return None
    of = {
        source.name: Head(source, _own_names(source, names), _names_in_class(source, own))
        for source, own in zip(sources[1:], renamed[1:], strict=True)
    }
    if policies.absent == "own":
        added = _of_one_expert(sources[0], of)
    of.setdefault(BASE, Head(sources[0], _own_names(sources[0], names)))
    return Heads(sources[0], frozenset(names), of, added)


def without(sources: Sequence[Checkpoint], names: Collection[str]) -> list[Checkpoint]:
    """The sources with tensors that no merge acts on."""
    return [with_tensors(source, {}, copied=frozenset(names)) for source in sources]


def shared_parts(sources: Sequence[Checkpoint], heads: Heads) -> list[Checkpoint]:
    """The sources without what each keeps for itself, and where that is."""
    base, *experts = without(sources, heads.names)
    return [base, *(_part(expert, heads.of[expert.name]) for expert in experts)]


def _part(view: Checkpoint, head: Head) -> Checkpoint:
    if not isinstance(view, Aligned) or not head.names:
        return view
    return replace(view, whole=WholeModel(head.source.path, head.names, head.renamed))


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


def _heads_of(sources: Sequence[Checkpoint]) -> set[str]:
    shapes = [shapes_of(source) for source in sources]
    return odd_heads(shapes, tied_apart(sources)) | _classifiers(sources, shapes)


def _classifiers(sources: Sequence[Checkpoint], shapes: Sequence[Shapes]) -> set[str]:
    return classifier_heads(shapes, [label_count(source.config) for source in sources])


def _trained_apart(source: Checkpoint) -> bool:
    """Whether a source is an adapter that stores a head whole and does not name its classes."""
    stored = stored_source(source)
    if not isinstance(stored, AdaptedCheckpoint):
        return False
    return bool(stored.saved) and labels_of(stored.config) is None


def _names_in_class(source: Checkpoint, own: Mapping[str, str]) -> dict[str, str]:
    """Name of a tensor -> what a checkpoint of the source's class calls it, where they differ.

    Args:
        source: With the names of the base.
        own: Name -> name in the stored source, where they differ.
    """
    stored = stored_source(source)
    if not isinstance(stored, AdaptedCheckpoint) or not stored.stored_as:
        return dict(own)
    seen = {name: own.get(name, name) for name in source.tensors}
    named = {name: stored.stored_as.get(before, before) for name, before in seen.items()}
    return {name: last for name, last in named.items() if last != name}


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
