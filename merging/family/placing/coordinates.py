"""Experts that were trained from another start, seen in the coordinates of the base."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

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


def in_base_coordinates(
    sources: Sequence[Checkpoint], align: Mapping[str, AlignSpec]
) -> list[Checkpoint]:
    """Base and experts, with the units of some experts where the base has them.

    No weights are read: tensors are moved when they are read.

    Raises:
        RecipeError: If there is no expert of a name.
    """
    base, *experts = sources
    pleas = [name for name, spec in align.items() if spec.method == "pleas"]
    odd = next((name for name in align if name not in {e.name for e in experts}), None)
    if odd is not None:
        raise RecipeError(
            f"special.align: expected names of experts, received {odd!r}; "
            f"{did_you_mean(odd, {expert.name for expert in experts})}"
        )
    if pleas:
        if len(experts) != 1:
            raise RecipeError(
                f"special.align: pleas: expected one expert beside the base, received "
                f"{len(experts)}; use weight_matching, or merge two first"
            )
        return _widened(base, experts[0], align[pleas[0]])
    return [base, *(_moved(base, e, align[e.name]) if e.name in align else e for e in experts)]


def _moved(base: Checkpoint, expert: Checkpoint, spec: AlignSpec) -> Checkpoint:
    _check_items(base, spec)
    late = _Late(base, expert, spec)
    made = {
        name: (unstored(expert, shape, dtype), partial(late.read, name))
        for name, (shape, dtype) in expert.merged.items()
    }
    return with_tensors(
        expert, made, done=f"aligned {spec.model_dump()} {item_versions(spec)}", beside=(base,)
    )


def _widened(base: Checkpoint, expert: Checkpoint, spec: AlignSpec) -> list[Checkpoint]:
    """Base and expert in layers that are wide enough for units of both."""
    from mergesearch.merging.alignment.pleas import Widened

    _check_items(base, spec)
    late = _Late(base, expert, spec)
    wider = Widened(late.alignment)

    def read(name: str, *, of_expert: bool) -> torch.Tensor:
        late.prepare()
        return wider.read(name, expert=of_expert)

    seen = []
    for source, other in ((base, expert), (expert, base)):
        is_expert = source is expert
        made = {
            name: (
                unstored(source, shape, source.tensors[name].dtype),
                partial(read, name, of_expert=is_expert),
            )
            for name, shape in wider.shapes.items()
        }
        if is_expert:
            made |= {
                name: (unstored(source, shape, dtype), partial(late.read, name))
                for name, (shape, dtype) in source.merged.items()
                if name not in made
            }
        done = f"widened {is_expert} {spec.model_dump()} {item_versions(spec)}"
        seen.append(with_tensors(source, made, config=wider.config, done=done, beside=(other,)))
    return seen


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
