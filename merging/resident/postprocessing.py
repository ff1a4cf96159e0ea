"""Tensors of a resident model whose weighted sum is not yet what is merged.

They are logarithms of scalars and variances
(:attr:`mergesearch.merging.family.special_tensors.SpecialTensors.postprocessed`): few and small, so
each is merged again by itself, as an export merges it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mergesearch.merging.family.special_tensors import (
    SpecialTensors,
    postprocess,
    postprocess_gradient,
)
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.torch_kernel import as_tensor
from mergesearch.merging.resident.shard import slice_of
from mergesearch.merging.resident.terms import Terms
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import TensorSpec


def postprocessed_tensor(
    terms: Terms, special: SpecialTensors, spec: TensorSpec, field: Field
) -> torch.Tensor:
    """One merged tensor in its own dtype, in the accumulation dtype until it is postprocessed."""
    base = as_tensor(terms.base_of(spec)).view(spec.shape)
    total = _weighted_sum(terms, spec, field).view(spec.shape)
    exact = postprocess(special, spec.name, total, base, spec.dtype)
    return exact.to(getattr(torch, spec.dtype))


@contextmanager
def gradient_of_sums(
    terms: Terms,
    special: SpecialTensors,
    specs: Sequence[TensorSpec],
    gradient: torch.Tensor,
    field: Field,
) -> Iterator[None]:
    """A context in which ``gradient`` is taken with respect to weighted sums.

    Inside, the parts of ``specs`` are dL/dsum = dL/dmerged · dmerged/dsum; afterwards they are
    dL/dmerged again.

    Args:
        terms: Of the merge.
        special: How the tensors are postprocessed.
        specs: The tensors that are.
        gradient: ``(size,)``: derivatives with respect to the merged weights.
        field: Where the weights were merged.
    """
    before = {spec: slice_of(gradient, spec).clone() for spec in specs}
    for spec in specs:
        slope = postprocess_gradient(
            special,
            spec.name,
            _weighted_sum(terms, spec, field),
            as_tensor(terms.base_of(spec)),
        )
        slice_of(gradient, spec).mul_(slope.view(spec.shape))
    try:
        yield
    finally:
        for spec, part in before.items():
            slice_of(gradient, spec).copy_(part)


def _weighted_sum(terms: Terms, spec: TensorSpec, field: Field) -> torch.Tensor:
    """The weighted sum of one tensor ``(size,)``, in the accumulation dtype."""
    base, rows = (as_tensor(part) for part in terms.read(spec.start, spec.stop))
    angles = None if terms.angles is None else terms.angles.restrict(spec.start, spec.stop)
    total = torch.empty_like(base)
    combine(
        base,
        list(rows),
        field.restrict(spec.start, spec.stop),
        terms.form,
        total,
        angles=angles,
        threads=1,
    )
    return total
