"""Experts that were trained from another start, seen in the coordinates of the base."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

from mergesearch.merging.alignment.shapes import same_shapes
from mergesearch.merging.alignment.spec import AlignSpec, item_versions
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import InputError, RecipeError, did_you_mean
from mergesearch.merging.family.aligned import unstored, with_tensors
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.models.calibration_experts import check_model
from mergesearch.merging.models.calibration_spec import DEFAULTS, refuse_calibration

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.alignment.aligning import ExpertAlignment
    from mergesearch.merging.alignment.pleas import Widened
    from mergesearch.merging.tensors.owned import Owned


def in_base_coordinates(
    sources: Sequence[Checkpoint], align: Mapping[str, AlignSpec]
) -> list[Checkpoint]:
    """Base and experts, with the units of some experts where the base has them.

    No weights are read: tensors are moved when they are read.

    Raises:
        RecipeError: If there is no expert of a name.
    """
    base, *experts = sources
    odd = next((name for name in align if name not in {e.name for e in experts}), None)
    if odd is not None:
        raise RecipeError(
            f"special.align: expected names of experts, received {odd!r}; "
            f"{did_you_mean(odd, {expert.name for expert in experts})}"
        )
    if any(spec.method == "pleas" for spec in align.values()):
        return _widened(base, experts, _common(align, experts))
    return [base, *(_moved(base, e, align[e.name]) if e.name in align else e for e in experts)]


def widenings(base: Checkpoint, experts: Sequence[Checkpoint], spec: AlignSpec) -> Widened:
    """Base and experts in layers that are wide enough for units of all, as ``pleas`` has them."""
    from mergesearch.merging.alignment.aligning import ExpertAlignment
    from mergesearch.merging.alignment.pleas import Widened
    from mergesearch.merging.alignment.subject import Subject

    subject = Subject(base, spec.calibration, spec.seed)
    return Widened(tuple(ExpertAlignment(subject, expert, spec) for expert in experts))


def _common(align: Mapping[str, AlignSpec], experts: Sequence[Checkpoint]) -> AlignSpec:
    """What all experts are widened by.

    Raises:
        RecipeError: If some are not, or by other settings: layers have one width.
    """
    given = [align.get(expert.name) for expert in experts]
    first = next(iter(align.values()))
    odd = next((e.name for e, spec in zip(experts, given, strict=True) if spec != first), None)
    if odd is not None:
        raise RecipeError(
            "special.align: pleas: expected the same settings for all experts, whose units share "
            f"layers, received others for {odd!r}; give each the same, or use weight_matching"
        )
    return first


def _moved(base: Checkpoint, expert: Checkpoint, spec: AlignSpec) -> Checkpoint:
    _check_items(base, spec)
    late = _Late(base, expert, spec)
    other = spec.method == "transport" and not same_shapes(base, expert)
    if other and spec.residual != "joint":
        raise RecipeError(
            f"special.align: transport: expected residual joint for expert {expert.name!r}, which "
            f"has other widths than the base, received {spec.residual}; leave it out"
        )
    made = {
        name: (
            unstored(expert, base.shape(name) if other else shape, dtype),
            partial(late.read, name),
        )
        for name, (shape, dtype) in expert.merged.items()
        if name in base.tensors or not other
    }
    config = base.config if other else None
    return with_tensors(expert, made, config=config, done=f"aligned {_said(spec)}", beside=(base,))


def _widened(base: Checkpoint, experts: Sequence[Checkpoint], spec: AlignSpec) -> list[Checkpoint]:
    """Base and experts in layers that are wide enough for units of all."""
    _check_items(base, spec)
    late = _LateWidened(widenings(base, experts, spec))
    wider = late.widened
    shapes = wider.shapes
    sources = (base, *experts)
    seen = []
    for place, source in enumerate(sources):
        made = {
            name: (
                unstored(source, shape, source.tensors[name].dtype),
                partial(late.read, name, place),
            )
            for name, shape in shapes.items()
        }
        if place:
            made |= {
                name: (unstored(source, shape, dtype), partial(late.aligned, name, place))
                for name, (shape, dtype) in source.merged.items()
                if name not in made
            }
        done = f"widened {place if place > 1 else bool(place)} {_said(spec)}"
        beside = tuple(each for each in sources if each is not source)
        owned = partial(late.owned, place=place)
        seen.append(
            with_tensors(source, made, config=wider.config, done=done, beside=beside, owned=owned)
        )
    return seen


def _said(spec: AlignSpec) -> str:
    return f"{spec.model_dump()} {item_versions(spec)}"


def _check_items(base: Checkpoint, spec: AlignSpec) -> None:
    """Refuse items that are not there, and a model that does not load the base.

    Raises:
        RecipeError: In one line.
    """
    if spec.calibration is None:
        return
    options = {"calibration": {**DEFAULTS, **spec.calibration}}
    reason = refuse_calibration(layout_of(base), 1, options)
    if reason is not None:
        raise RecipeError(f"special.align: {reason}")
    try:
        check_model(options, base)
    except InputError as error:
        raise RecipeError(f"special.align: {error}") from None


class _LateWidened:
    """Alignments that are made when the first tensor is read; threads wait for them."""

    def __init__(self, widened: Widened) -> None:
        self.widened = widened
        self._lock = threading.Lock()

    def read(self, name: str, place: int) -> torch.Tensor:
        """A tensor of a source in the wider coordinates."""
        self._prepare()
        return self.widened.read(name, place)

    def aligned(self, name: str, place: int) -> torch.Tensor:
        """A tensor of an expert, counted from 1, whose shape stays."""
        self._prepare()
        return self.widened.alignments[place - 1].read(name)

    def owned(self, name: str, place: int) -> Owned:
        """Which units of a tensor a source has."""
        self._prepare()
        return self.widened.owned(name, place)

    def _prepare(self) -> None:
        with self._lock:
            for alignment in self.widened.alignments:
                alignment.prepare()


class _Late:
    """An alignment that is made when the first tensor is read; threads wait for it."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, spec: AlignSpec) -> None:
        self._sources = (base, expert)
        self._spec = spec
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the expert in the coordinates of the base."""
        self.prepare()
        return self.alignment.read(name)

    def prepare(self) -> None:
        """Find where units go, unless it is known."""
        with self._lock:
            self.alignment.prepare()

    @cached_property
    def alignment(self) -> ExpertAlignment:
        """The alignment; threads hold the lock while they make it."""
        from mergesearch.merging.alignment.aligning import ExpertAlignment
        from mergesearch.merging.alignment.subject import Subject

        base, expert = self._sources
        return ExpertAlignment(
            Subject(base, self._spec.calibration, self._spec.seed), expert, self._spec
        )
