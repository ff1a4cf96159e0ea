"""Merging without arenas: state dicts in memory, or any tensor source, one tensor at a time.

Bit for bit what an arena gives: the same rows, accumulated in the same precision, rounded once to
the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergesearch.merging.errors import CheckpointError, RecipeError
from mergesearch.merging.family.basis import prepare_basis
from mergesearch.merging.family.messages import listed, warn
from mergesearch.merging.family.special_tensors import PLAIN, SpecialTensors, postprocess
from mergesearch.merging.family.state_dict_checks import (
    StateDict,
    check_expert,
    dtype_name,
    is_merged,
    kept_names,
)
from mergesearch.merging.family.state_dicts import AlignedStates, align_states, warn_of_integers
from mergesearch.merging.family.untouched import UNKNOWN, undivided_names
from mergesearch.merging.kernels.dispatch import accumulation_dtype, combine, term_weights
from mergesearch.merging.kernels.forms import Patches
from mergesearch.merging.kernels.host import stored_numbers
from mergesearch.merging.kernels.lowrank import combine_factors
from mergesearch.merging.lineage.refusal import check_lineages
from mergesearch.merging.lineage.state_dicts import state_lineages
from mergesearch.merging.operators import Basis, Operator, Options, TensorSource, get_operator
from mergesearch.merging.operators.parts.task_vectors import is_stored_whole
from mergesearch.merging.policies import TensorPolicies, parse_policies
from mergesearch.merging.resident.factor_choice import low_rank_factors
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec
from mergesearch.merging.tensors.parallel import parallel_map, run_single_threaded
from mergesearch.merging.tensors.rounding import Rounding, rounding_of

Coefficients = float | Sequence[float] | Field | None

#: How a caller merges experts that do not come from the base, for messages.
_OVERRIDE = 'pass allow_unrelated="REASON"'

#: Tensor and the name of the dtype to store it in -> the merged tensor, and what rounding it cost.
TensorMerger = Callable[[TensorSpec, str], tuple[torch.Tensor, Rounding]]

#: Called once all tensors are merged: what is to be written over one of them, or None.
Settle = Callable[[], Patches | None]

#: As :data:`TensorMerger`, with what may have to be settled later (:func:`merge_open`).
OpenMerger = Callable[[TensorSpec, str], tuple[torch.Tensor, Rounding, Settle | None]]


def merge(
    base: StateDict,
    experts: Sequence[StateDict] | Mapping[str, StateDict],
    *,
    operator: str = "task_arithmetic",
    coefficients: Coefficients = None,
    special: TensorPolicies | Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    allow_unrelated: str | bool = False,
    **hyperparameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts into a new one, in the order, dtypes and devices of the base.

    Floating tensors are merged; integers and booleans are copied from the base. Tensors that share
    their memory in the base (tied weights) are merged once and share their memory in the result.
    Inputs are not modified.

    Args:
        base: Name -> tensor.
        experts: State dicts with the names and shapes of the base, in order, or by name.
        operator: A name in :data:`mergesearch.merging.operators.OPERATORS`.
        coefficients: One number for all directions, one per direction, or a :class:`Field` over the
            flat index of the floating tensors (:meth:`Layout.build`); None takes the operator's
            default.
        special: Policies for running statistics, scalars, new heads and ties
            (:class:`mergesearch.merging.policies.TensorPolicies`).
        config: Content of the model's ``config.json`` (``model.config.to_dict()``), which says how
            fused projections of attention are divided into heads.
        allow_unrelated: Why experts are merged that do not come from the base, or True.
        **hyperparameters: The operator's own.

    Raises:
        CheckpointError: If an expert has other names, shapes or kinds of tensors, unties what the
            base ties, or does not come from the base.
        RecipeError: If the operator, a hyperparameter or the coefficients are not what they should
            be.
    """
    labels, states = _labelled(experts)
    _check_states(["base", *(f"expert {label!r}" for label in labels)], [base, *states])
    _check_config(config)
    policies = parse_policies(special)
    aligned = align_states(base, states, policies)
    kept = kept_names(aligned.base, policies)
    named = list(zip(labels, aligned.experts, strict=True))
    for label, state in named:
        check_expert(label, state, aligned.base, kept)
    warn_of_integers(aligned.base, aligned.experts)
    layout = _layout_of(aligned, kept)
    chosen = get_operator(operator)
    options = chosen.check(layout, len(states), hyperparameters)
    chosen_field = _field(coefficients, chosen, len(states), options, layout)
    first = MappingSource("base", aligned.base, layout.names, config=config)
    sources = [MappingSource(label, one, layout.names, config=config) for label, one in named]
    lineages = state_lineages(aligned.base, named, layout, config)
    for line in check_lineages(lineages, allow_unrelated, _OVERRIDE):
        warn(line)
    warn(_undivided(chosen, layout, options, config))
    merged = dict(
        merge_stream(first, sources, operator, options, chosen_field, layout, aligned.special)
    )
    return _with_copies(merged, aligned.base, kept)


def _check_states(names: Sequence[str], states: Sequence[object]) -> None:
    """Refuse models in the place of their state dicts."""
    for name, state in zip(names, states, strict=True):
        if not isinstance(state, Mapping):
            hint = "; pass model.state_dict()" if hasattr(state, "state_dict") else ""
            raise CheckpointError(
                f"{name}: expected a mapping of names to tensors, received "
                f"{type(state).__name__}{hint}"
            )


def _check_config(config: object) -> None:
    if config is not None and not isinstance(config, Mapping):
        raise RecipeError(
            "config: expected the content of config.json as a mapping, received "
            f"{type(config).__name__}; pass model.config.to_dict()"
        )


def _undivided(
    operator: Operator, layout: Layout, options: Options, config: Mapping[str, Any] | None
) -> str | None:
    """A warning of fused projections that are taken for one matrix; None if there are none."""
    names = undivided_names(operator, layout, options, config)
    if not names:
        return None
    return (
        f"{operator.name}: fused projections are merged as one matrix, as {UNKNOWN}: "
        f"{listed(names)}; pass config=model.config.to_dict(), or fused='whole'"
    )


def _labelled(
    experts: Sequence[StateDict] | Mapping[str, StateDict],
) -> tuple[list[str], list[StateDict]]:
    """Names and state dicts of experts; those of a sequence are named by their number."""
    by_name = experts if isinstance(experts, Mapping) else dict(enumerate(experts))
    if not by_name:
        raise RecipeError("merge: expected at least one expert, received none")
    return [str(name) for name in by_name], list(by_name.values())


def _layout_of(aligned: AlignedStates, kept: Mapping[str, str]) -> Layout:
    """The layout of the tensors that are merged: floating, each memory once, none of the copied."""
    return Layout.build(
        {
            name: (tuple(tensor.shape), dtype_name(tensor))
            for name, tensor in aligned.base.items()
            if kept[name] == name and name not in aligned.copied and is_merged(tensor)
        }
    )


def _with_copies(
    merged: StateDict, base: StateDict, kept: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Merged tensors and copies of the base's others, in its order; tied names share a tensor."""
    copied = {
        name: tensor.detach().clone()
        for name, tensor in base.items()
        if kept[name] == name and name not in merged
    }
    tensors = {**merged, **copied}
    return {name: tensors[kept[name]] for name in base}


def merge_stream(
    base: TensorSource,
    experts: Sequence[TensorSource],
    operator: str,
    options: Mapping[str, Any],
    field: Field,
    layout: Layout,
    special: SpecialTensors = PLAIN,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge the tensors of ``layout`` one at a time, in its order.

    Yields name and merged tensor, in the base's dtype. Holds no more than the operator's working
    set for one tensor, in the accumulation dtype.

    Raises:
        RecipeError: If the operator or an option is unknown, or the field does not fit layout and
            experts.
    """
    merge_one = tensor_merger(base, experts, operator, options, field, layout, special)

    def work(spec: TensorSpec) -> tuple[str, torch.Tensor]:
        return spec.name, merge_one(spec, spec.dtype)[0]

    return parallel_map(work, layout.tensors)


def tensor_merger(
    base: TensorSource,
    experts: Sequence[TensorSource],
    operator: str,
    options: Mapping[str, Any],
    field: Field,
    layout: Layout,
    special: SpecialTensors = PLAIN,
    threads: int = 1,
) -> TensorMerger:
    """Prepare a merge, and return the function that merges one tensor of it.

    The function takes a tensor of ``layout`` and the dtype to store it in. It may run in several
    threads at once, as :func:`mergesearch.merging.tensors.parallel.parallel_map` runs it.

    Raises:
        RecipeError: If the operator or an option is unknown, or the field does not fit layout and
            experts.
    """
    return partial(
        merge_tensor,
        prepared_merge(base, experts, operator, options, field, layout, special, threads),
    )


def prepared_merge(
    base: TensorSource,
    experts: Sequence[TensorSource],
    operator: str,
    options: Mapping[str, Any],
    field: Field,
    layout: Layout,
    special: SpecialTensors = PLAIN,
    threads: int = 1,
) -> PreparedMerge:
    """What the merge of single tensors needs.

    Raises:
        RecipeError: As :func:`tensor_merger`.
    """
    chosen = get_operator(operator)
    full = chosen.check(layout, len(experts), options)
    basis = run_single_threaded(
        lambda: prepare_basis(chosen, base, experts, full, special), threads
    )
    if field.size != layout.size or field.directions != basis.directions:
        raise RecipeError(
            f"field: expected {basis.directions} directions over {layout.size} positions, received "
            f"{field.directions} over {field.size}"
        )
    wide = getattr(torch, accumulation_dtype(layout))
    return PreparedMerge(base, experts, basis, field, special, wide)


@dataclass(frozen=True, eq=False)
class PreparedMerge:
    """All that the merge of a single tensor needs.

    Attributes:
        base: The base.
        experts: The experts.
        basis: Of the operator.
        field: Coefficients.
        special: Tensors whose weighted sum is not yet what is merged.
        wide: Accumulation dtype.
    """

    base: TensorSource
    experts: Sequence[TensorSource]
    basis: Basis
    field: Field
    special: SpecialTensors
    wide: torch.dtype


def merge_tensor(
    merge: PreparedMerge, spec: TensorSpec, dtype: str
) -> tuple[torch.Tensor, Rounding]:
    """One merged tensor in ``dtype``, and what rounding it cost."""
    merged, rounding, _ = merge_open(merge, spec, dtype, later=False)
    return merged, rounding


def merge_open(
    merge: PreparedMerge, spec: TensorSpec, dtype: str, later: bool = True
) -> tuple[torch.Tensor, Rounding, Settle | None]:
    """:func:`merge_tensor` for a caller who merges all tensors.

    It does not wait for statistics of the whole model. Where some matter, the third result gives
    what they change, once every tensor is merged.
    """
    stored = getattr(torch, dtype)
    if _is_merged_as_stored(merge, spec):
        merged = _merge_stored(merge, spec, stored, later)
        if merged is not None:
            return merged
    exact = merge_wide(merge, spec)
    rounded = exact.to(stored)
    origin = merge.base.read(spec.name).detach().to(exact.device)
    return rounded, rounding_of(exact, rounded, origin), None


def _is_merged_as_stored(merge: PreparedMerge, spec: TensorSpec) -> bool:
    """Whether a tensor may be merged without widening its sources."""
    if spec.size == 0 or merge.wide == torch.float64 or spec.name in merge.special.postprocessed:
        return False
    return is_stored_whole(merge.experts, spec.name)


def _merge_stored(
    merge: PreparedMerge, spec: TensorSpec, dtype: torch.dtype, later: bool
) -> tuple[torch.Tensor, Rounding, Settle | None] | None:
    """One tensor from the sources as they are stored, in one pass.

    None if the operator has no such way, or the sources are not fit for it.
    """
    basis = merge.basis
    if basis.direct is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    tensors = [source.read(spec.name).detach() for source in (merge.base, *merge.experts)]
    numbers = [stored_numbers(tensor) for tensor in tensors]
    if any(array is None for array in numbers):
        return None
    out = torch.empty(spec.shape, dtype=dtype)
    part = merge.field.restrict(spec.start, spec.stop)
    weights = term_weights(part, basis.form, angles=_angles(basis, spec))
    direct = basis.direct(spec.name, numbers, weights, part.boundaries, stored_numbers(out), later)
    if direct is None:
        return None
    cost = Rounding(direct.lost, direct.change, frozenset({dtype_name(out)}))
    return out, cost, direct.settle


def merge_wide(merge: PreparedMerge, spec: TensorSpec) -> torch.Tensor:
    """One tensor in the accumulation dtype."""
    basis = merge.basis
    wide = merge.wide
    tensor = merge.base.read(spec.name).detach().to(wide)
    if spec.size == 0:
        return tensor.clone()
    out = torch.empty(spec.size, dtype=wide, device=tensor.device)
    part = merge.field.restrict(spec.start, spec.stop)
    factors = low_rank_factors(basis, spec, merge.special.postprocessed)
    if factors is not None:
        left = factors.left.to(tensor.device, wide)
        right = factors.right.to(tensor.device, wide)
        combine_factors(tensor.reshape(-1), left, right, factors.owner, part, out, threads=1)
        return out.view(spec.shape)
    rows = [row.to(wide).reshape(-1) for row in basis.rows(spec.name)]
    combine(tensor.reshape(-1), rows, part, basis.form, out, angles=_angles(basis, spec), threads=1)
    return postprocess(merge.special, spec.name, out.view(spec.shape), tensor, spec.dtype)


def _angles(basis: Basis, spec: TensorSpec) -> Field | None:
    """The angle of a tensor as a field over it, for the form ``slerp``."""
    if basis.angles is None:
        return None
    return Field.constant(spec.size, [basis.angles(spec.name)])


@dataclass(frozen=True)
class MappingSource:
    """A state dict as a :class:`TensorSource`."""

    name: str
    tensors: StateDict
    names: Sequence[str]
    memo: None = None
    identity: str = ""
    config: Mapping[str, Any] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself."""
        return self.tensors[name].detach()


def _field(
    coefficients: Coefficients, operator: Operator, experts: int, options: Options, layout: Layout
) -> Field:
    if isinstance(coefficients, Field):
        return coefficients
    directions = operator.directions(experts, options)
    chosen = operator.default(experts, options) if coefficients is None else coefficients
    values = (
        [float(value) for value in chosen]
        if isinstance(chosen, Iterable)
        else [float(chosen)] * directions
    )
    if len(values) != directions:
        raise RecipeError(
            f"coefficients: expected one number or {directions}, received {len(values)}"
        )
    return Field.constant(layout.size, values)
