"""Experts in the coordinates of their base: how the moves of one are found, kept and applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from mergesearch.merging.alignment import rectangular
from mergesearch.merging.alignment.activations import activation_terms
from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.invertible import (
    attentions_of,
    maps_of,
    with_heads_assigned,
)
from mergesearch.merging.alignment.matching import Term, match
from mergesearch.merging.alignment.moving import Moves, from_tensors, moved, to_tensors
from mergesearch.merging.alignment.rectangular import Plans
from mergesearch.merging.alignment.rotations import with_turns
from mergesearch.merging.alignment.shapes import same_shapes
from mergesearch.merging.alignment.spec import AlignSpec, item_versions
from mergesearch.merging.alignment.streams import stream_maps
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.alignment.transport import transported
from mergesearch.merging.attention.realigning import MappedHeads
from mergesearch.merging.checkpoints.checkpoint import Checkpoint

#: Raised when the same settings begin to mean other moves.
FORMAT = 1


@dataclass(frozen=True, eq=False)
class ExpertAlignment:
    """An expert and how it is brought into the coordinates of its base.

    Nothing is loaded or compared before the first tensor is asked for.

    Attributes:
        subject: The base and its model.
        expert: The expert as it is stored.
        spec: What the user asked for.
    """

    subject: Subject
    expert: Checkpoint
    spec: AlignSpec

    @cached_property
    def found(self) -> tuple[Groups, Moves]:
        """Groups of the base, and moves of the expert's units."""
        moves = self._moves()
        return self.subject.groups, moves

    @cached_property
    def plans(self) -> Plans | None:
        """How an expert of other widths gets the base's shapes; None for one that has them."""
        if same_shapes(self.subject.base, self.expert):
            return None
        other = Subject(self.expert, self.subject.calibration, self.subject.seed)

        def computed() -> dict[rectangular.Key, torch.Tensor]:
            return rectangular.plans_between(self.subject, other, self.spec.smoothing)

        memo = self.subject.base.memo
        if memo is None:
            return Plans(computed(), self.subject.groups)
        key = ["plans", *self._key]
        kept = memo.get(key, lambda: rectangular.to_tensors(computed()))
        return Plans(rectangular.from_tensors(kept), self.subject.groups)

    def prepare(self) -> None:
        """Find the moves, if they are not known yet, and let go of the model."""
        if "found" in self.__dict__ or self.__dict__.get("plans") is not None:
            return
        if self.plans is None:
            _ = self.found
        self.subject.release()

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the expert in the coordinates of the base."""
        if self.plans is not None:
            return self.plans.mapped(name, self.expert.read(name))
        tensor = self._in_order(name)
        if self.heads is None or name not in self.heads.names:
            return tensor
        return self.heads.apply(name, tensor, str(tensor.dtype).removeprefix("torch."))

    def _in_order(self, name: str) -> torch.Tensor:
        return self.reading(self.found[1])(name)

    def reading(self, moves: Moves) -> Callable[[str], torch.Tensor]:
        """What reads tensors of the expert that are moved so."""
        groups = self.subject.groups

        def read(name: str) -> torch.Tensor:
            tensor = self.expert.read(name)
            if name not in groups.tensors:
                return tensor
            return moved(tensor, groups.tensors[name], groups, moves, name)

        return read

    @cached_property
    def heads(self) -> MappedHeads | None:
        """Maps of channels within heads that cancel, if they are asked for."""
        if self.spec.method != "invertible":
            return None
        base = self.subject.base
        return maps_of(base, self._in_order, attentions_of(base))

    def _moves(self) -> Moves:
        memo = self.subject.base.memo
        if memo is None:
            return self._computed()
        return from_tensors(memo.get(self._key, lambda: to_tensors(self._computed())))

    @property
    def _key(self) -> list[Any]:
        """What moves depend on; units are matched before it is known how many are kept apart."""
        return [
            "alignment",
            FORMAT,
            self.subject.base.identity,
            self.expert.identity,
            self.spec.model_dump(exclude={"fraction"}),
            item_versions(self.spec),
        ]

    def _computed(self) -> Moves:
        return METHODS[self.spec.method](self)


def weight_terms(subject: Subject, expert: Any) -> list[Term]:
    """Terms of all tensors that units are moved in, compared by their weights."""
    return [
        Term(partial(_both, subject.base, expert, name), axes)
        for name, axes in subject.groups.tensors.items()
        if name in expert.tensors
        and expert.shape(name) == subject.base.shape(name)
        and any(leaf.group is not None for axis in axes for leaf in axis)
    ]


def _both(base: Any, expert: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return base.read(name).to(torch.float32), expert.read(name).to(torch.float32)


def _by_weights(alignment: ExpertAlignment) -> Moves:
    terms = weight_terms(alignment.subject, alignment.expert)
    spec = alignment.spec
    return match(alignment.subject.groups, terms, spec.seed, spec.sweeps)


def _by_activations(alignment: ExpertAlignment) -> Moves:
    terms = activation_terms(alignment.subject, alignment.expert)
    spec = alignment.spec
    return match(alignment.subject.groups, terms, spec.seed, spec.sweeps)


def _by_rotations(alignment: ExpertAlignment) -> Moves:
    terms = weight_terms(alignment.subject, alignment.expert)
    return with_turns(alignment.subject.groups, terms, _by_weights(alignment))


def _by_invertible(alignment: ExpertAlignment) -> Moves:
    subject = alignment.subject
    moves = _by_weights(alignment)
    return with_heads_assigned(subject.groups, subject.base, alignment.reading, moves)


def _by_transport(alignment: ExpertAlignment) -> Moves:
    spec = alignment.spec
    subject = alignment.subject
    terms = activation_terms(subject, alignment.expert)
    moves = transported(subject.groups, terms, _by_activations(alignment), spec.smoothing)
    if spec.residual == "joint":
        return moves
    own = stream_maps(subject, alignment.expert, spec.residual, spec.smoothing)
    return replace(moves, own=own)


def _by_what_is_given(alignment: ExpertAlignment) -> Moves:
    """By activations if there are items, else by weights."""
    given = alignment.spec.calibration is not None
    return _by_activations(alignment) if given else _by_weights(alignment)


#: Method -> the moves that it finds.
METHODS: dict[str, Callable[[ExpertAlignment], Moves]] = {
    "weight_matching": _by_weights,
    "activation_matching": _by_activations,
    "procrustes": _by_rotations,
    "invertible": _by_invertible,
    "transport": _by_transport,
    "pleas": _by_what_is_given,
}
