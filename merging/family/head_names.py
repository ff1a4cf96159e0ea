"""Which tensors are heads, from names, shapes and label sets alone.

A *head* is a tensor that does not line up between base and experts, with the rest of its module:
it has another shape in one of them, or is in some of them only. Where label sets differ, the
classifiers are heads as well, though their shapes may agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.tied import find_aliases, ties_embeddings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.messages import listed
from mergesearch.merging.family.vocabulary import is_vocabulary
from mergesearch.merging.tensors.roles import classify

#: Name -> shape of the tensors of a source that a merge acts on.
Shapes = Mapping[str, tuple[int, ...]]
#: The label of each class, in the order of the classes.
Labels = tuple[str, ...]

#: Modules that belong to one head though each is a module of its own, such as DistilBERT's
#: ``pre_classifier`` and ``classifier``.
_CLASSIFIER = re.compile(r"(\w+_)?classifier")
#: Labels that transformers writes where nobody named the classes.
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, eq=False)
class Backbone:
    """The names of all sources, and what each prefix of them holds.

    Attributes:
        names: Of all sources.
        closed: Prefixes that hold a numbered block, an embedding, or most of the elements: no head
            is as large as that.
    """

    names: frozenset[str]
    closed: frozenset[str]

    @classmethod
    def of(cls, sources: Sequence[Shapes]) -> Backbone:
        """The backbone of sources by the names and shapes of their tensors."""
        shapes = {name: shape for source in sources for name, shape in source.items()}
        total = sum(map(prod, shapes.values()))
        sizes: dict[str, int] = {}
        closed: set[str] = set()
        for name, shape in shapes.items():
            role = classify(name)
            inner = role.block is not None or role.module == "embedding"
            for prefix in prefixes(name):
                sizes[prefix] = sizes.get(prefix, 0) + prod(shape)
                if inner:
                    closed.add(prefix)
        closed |= {prefix for prefix, size in sizes.items() if 2 * size > total}
        return cls(frozenset(shapes), frozenset(closed))

    def module_of(self, name: str) -> str | None:
        """The outermost module of a tensor that is no part of the backbone, or None."""
        return next((prefix for prefix in prefixes(name) if prefix not in self.closed), None)

    def whole(self, names: Collection[str]) -> set[str]:
        """The tensors with all others of their modules."""
        modules = {module for name in names if (module := self.module_of(name)) is not None}
        if any(_CLASSIFIER.fullmatch(module) for module in modules):
            parts = {module for name in self.names if (module := self.module_of(name)) is not None}
            modules |= {module for module in parts if _CLASSIFIER.fullmatch(module)}
        return {*names, *(n for n in self.names if self.module_of(n) in modules)}


def prefixes(name: str) -> Iterator[str]:
    """Names of the modules that hold a tensor, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def odd_heads(sources: Sequence[Shapes], tied: Collection[str] = ()) -> set[str]:
    """Tensors that do not line up and may be heads, with the rest of their modules.

    Blocks and embeddings are none, nor are rows of other vocabularies, which have a policy of their
    own.

    Args:
        sources: Base and experts.
        tied: Output heads that some sources tie to the embedding; they have a policy as well.
    """
    backbone = Backbone.of(sources)
    odd = [name for name in backbone.names if name not in tied and not _lines_up(name, sources)]
    return backbone.whole([name for name in odd if _may_be_head(name, backbone, sources)])


def classifier_heads(sources: Sequence[Shapes], counts: Sequence[int]) -> set[str]:
    """Tensors of the classifiers: matrices of one row for each class, with their modules.

    Args:
        sources: Base and experts.
        counts: Number of classes of each.
    """
    backbone = Backbone.of(sources)
    pairs = list(zip(sources, counts, strict=True))

    def is_classifier(name: str) -> bool:
        module = backbone.module_of(name)
        shapes = [(source[name], count) for source, count in pairs if name in source]
        return (
            name.endswith(".weight")
            and module is not None
            and "." not in module
            and not is_vocabulary(name)
            and all(_has_rows(shape, count) for shape, count in shapes)
        )

    return backbone.whole([name for name in backbone.names if is_classifier(name)])


def label_count(config: Mapping[str, Any]) -> int:
    """Number of classes that a ``config.json`` states; transformers leaves out two."""
    labels = config.get("id2label")
    if isinstance(labels, Mapping):
        return len(labels)
    count = config.get("num_labels")
    return count if isinstance(count, int) else 2


def labels_of(config: Mapping[str, Any]) -> Labels | None:
    """The labels that a ``config.json`` states in the order of the classes; None for unnamed."""
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not labels:
        return None
    ordered = sorted(labels.items(), key=lambda item: (len(str(item[0])), str(item[0])))
    named = tuple(str(label) for _, label in ordered)
    return None if all(_UNNAMED.fullmatch(label) for label in named) else named


def labels_differ(base: Checkpoint, experts: Sequence[Checkpoint]) -> bool:
    """Whether experts have other label sets than each other, or than a base that names its own."""
    known = {labels_of(expert.config) for expert in experts}
    own = labels_of(base.config)
    return len(known) > 1 or (own is not None and own not in known)


def tied_apart(sources: Sequence[Checkpoint]) -> set[str]:
    """Output heads that some sources tie to the embedding and others do not."""
    if len({ties_embeddings(source.config) for source in sources}) == 1:
        return set()
    return {alias for source in sources for alias, _ in find_aliases(source.tensors, tied=True)}


def refuse_other_depths(names: Collection[str], sources: Sequence[Shapes], where: str) -> None:
    """Refuse tensors that are blocks of a list of which all sources have some.

    Raises:
        CheckpointError: If the sources have different depths.
    """
    everywhere = {name for name in sources[0] if all(name in source for source in sources)}
    shared = {prefix for name in everywhere for prefix in prefixes(name)}
    lists = {prefix.rpartition(".")[0] for prefix in shared if prefix.rpartition(".")[2].isdigit()}
    for name in sorted(names):
        unit = next((prefix for prefix in prefixes(name) if prefix not in shared), name)
        parent, _, last = unit.rpartition(".")
        if last.isdigit() and parent in lists:
            extra = [other for other in names if other.startswith(f"{unit}.")]
            raise CheckpointError(
                f"{where}: expected {parent!r} of one depth in all sources, received {unit!r} in "
                f"some only ({listed(extra)}); leave out the sources of another depth"
            )


def refuse_uneven(name: str, shapes: Collection[str]) -> None:
    """Refuse to average heads of several shapes.

    Args:
        name: Of the tensor.
        shapes: Those that experts have, in words, ``none`` among them where one lacks it.

    Raises:
        CheckpointError: If there is more than one.
    """
    if len(shapes) > 1:
        raise CheckpointError(
            f"special.heads: average: expected one shape of {name!r} in all experts, received "
            f"{', '.join(sorted(shapes))}; set heads: own or base"
        )


def _lines_up(name: str, sources: Sequence[Shapes]) -> bool:
    return len({source.get(name) for source in sources}) == 1


def _may_be_head(name: str, backbone: Backbone, sources: Sequence[Shapes]) -> bool:
    shapes = [source[name] for source in sources if name in source]
    if len(set(shapes)) > 1 and is_vocabulary(name) and len({shape[1:] for shape in shapes}) == 1:
        return False
    role = classify(name)
    if role.block is None and role.module != "embedding":
        return True
    # Blocks of a head that is a model of its own: nothing beside it is shared.
    outer = name.partition(".")[0]
    return not any(
        other.partition(".")[0] == outer and _lines_up(other, sources) for other in backbone.names
    )


def _has_rows(shape: tuple[int, ...], count: int) -> bool:
    return len(shape) >= 2 and shape[0] == count and prod(shape[2:]) == 1
