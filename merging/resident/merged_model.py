"""A resident model whose parameters are views into one merged buffer: a trial writes the buffer,
nothing else.

Names differ: transformers 5 stores a ViT as
``vit.encoder.layer.0.attention.attention.query.weight`` and keeps it in memory as
``vit.layers.0.attention.q_proj.weight``. The map between the two is taken from transformers itself,
by asking how it would save the model and seeing which memory each stored name then points to. Where
saving copies (experts of a mixture, fused in memory), it is asked once more, about element numbers
instead of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mergesearch.merging.errors import CheckpointError, InputError, MergesearchError, NonFiniteError
from mergesearch.merging.family.special_tensors import postprocess, postprocess_gradient
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.torch_kernel import as_tensor
from mergesearch.merging.models.loading import _widest
from mergesearch.merging.models.parameter_views import (
    ParameterView,
    _as_stored,
    _held_tensors,
    _memory,
    _owner,
    _place_of,
)
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.gradient import (
    Terms,
    coefficient_gradient,
    expert_cosines,
    expert_norms,
    parts,
)
from mergesearch.merging.resident.packing import StoredFactors, combine_packed
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import TensorSpec


@dataclass(frozen=True, eq=False)
class _Copied:
    """A stored tensor that is no parameter of its own: a part of a fused one, or kept in another
    dtype.
    """

    spec: TensorSpec
    target: torch.Tensor
    owner: torch.Tensor
    place: ParameterView


class MergedModel:
    """A model bound to one merged buffer.

    Attributes:
        model: The bound model. Its parameters change with every :meth:`write`; do not move or cast
            it.
        layout: Places of the tensors in the buffer.
        merged: The buffer ``(size,)`` in the common dtype of the base's tensors, else the widest of
            them.
    """

    def __init__(
        self, model: nn.Module, arenas: Arenas, *, threads: int = 1, device: str = "cpu"
    ) -> None:
        """Bind ``model``, loaded from the base, to the layout of ``arenas``.

        Args:
            model: As :func:`load_model` gives it; its parameters are re-pointed.
            arenas: Base and basis.
            threads: CPU threads of :meth:`write`.
            device: ``cpu`` reads the mapped arenas; elsewhere they are copied to the device.

        Raises:
            CheckpointError: If a stored tensor has no place in the model, or a parameter is not
                stored.
        """
        self.model = model.to(device)
        self.layout = arenas.layout
        self._form = arenas.form
        self._angles = arenas.angles
        self._threads = threads
        self._base = as_tensor(arenas.base).to(device)
        self._basis = as_tensor(arenas.basis).to(device)
        self._packing = arenas.packing
        self._factors = [_on_device(f, device) for f in arenas.factors]
        dtype = _widest(spec.dtype for spec in arenas.layout.tensors)
        self.merged = torch.zeros(arenas.layout.size, dtype=dtype, device=device)
        self._rounded = [
            s for s in arenas.layout.tensors if s.size and getattr(torch, s.dtype) != dtype
        ]
        self._treatment = arenas.treatment
        self._finished = [
            s for s in arenas.layout.tensors if s.size and s.name in arenas.treatment.postprocessed
        ]
        self._kept = arenas.copied
        self._bound: dict[str, tuple[torch.Tensor, TensorSpec]] = {}
        self._copied: list[_Copied] = []
        self._gradient: torch.Tensor | None = None
        self._norms: tuple[bytes, npt.NDArray[np.float64]] | None = None
        self._bind()

    def write(self, field: Field) -> None:
        """Merge with the coefficients of ``field`` into the model.

        Raises:
            RecipeError: If the field does not fit the arenas.
            NonFiniteError: If a merged tensor holds NaN or infinity; the model is then of no use
                until the next write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        with torch.no_grad():
            combine_packed(
                self._packing,
                self._base,
                self._basis,
                self._factors,
                field,
                self._form,
                self.merged,
                angles=self._angles,
                threads=self._threads,
            )
            for spec in self._rounded:
                part = self._slice(spec)
                part.copy_(part.to(getattr(torch, spec.dtype)))
            for spec in self._finished:
                self._slice(spec).copy_(self._finish(spec, field))
            for copied in self._copied:
                copied.target.copy_(self._slice(copied.spec))
            self._check_finite()

    def write_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write merged tensors of the layout, all of them, that come from elsewhere than the
        arenas.

        Raises:
            NonFiniteError: If one holds NaN or infinity; the model is then of no use until the next
                write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        with torch.no_grad():
            for name, tensor in tensors:
                self._slice(self.layout.by_name[name]).copy_(tensor)
            for copied in self._copied:
                copied.target.copy_(self._slice(copied.spec))
            self._check_finite()

    def check_binding(self) -> None:
        """Check that every bound parameter still lies at its place in the buffer.

        Raises:
            MergesearchError: If one does not.
        """
        first = self.merged.data_ptr()
        itemsize = self.merged.itemsize
        for name, (tensor, spec) in self._bound.items():
            if tensor.data_ptr() != first + spec.start * itemsize:
                raise MergesearchError(
                    f"parameter {name!r}: expected inside the merged buffer, received another "
                    "address; "
                    "do not move or cast a bound model, bind a new one"
                )

    def enable_gradient(self) -> None:
        """Let backward passes through the model accumulate into one buffer, laid out as the merged
        weights.

        Raises:
            InputError: If the merge is not smooth in its coefficients, or no derivative of it
                reaches them.
        """
        if self._gradient is not None:
            return
        self._terms()
        if self._treatment.statistics:
            raise InputError(
                "gradient: expected no merged running statistics, received "
                f"{len(self._treatment.statistics)}, which "
                "no backward pass reaches; set special.batch_norm: base, or choose a strategy "
                "without gradients"
            )
        self._gradient = torch.zeros_like(self.merged)
        for tensor, spec in self._bound.values():
            tensor.requires_grad_()
            tensor.grad = self._slice(spec, self._gradient)
        for copied in self._copied:
            copied.owner.requires_grad_()
            copied.owner.grad = torch.zeros_like(copied.owner)

    def clear_gradient(self) -> None:
        """Forget what backward passes have accumulated."""
        self._checked_gradient().zero_()
        for copied in self._copied:
            assert copied.owner.grad is not None
            copied.owner.grad.zero_()

    def gradient(self, field: Field) -> npt.NDArray[np.float64]:
        """Derivatives of the loss with respect to ``field.values``, from what backward passes have
        accumulated.

        Rounding to the model's dtype is passed straight through.

        Args:
            field: The one that was written last.

        Returns:
            fp64 ``(K, segments)``.

        Raises:
            RecipeError: If the field does not fit the arenas.
            MergesearchError: If gradients were replaced, or never enabled.
        """
        terms = self._terms()
        merged = self._gathered_gradient()
        with self._through_last_steps(merged, field):
            return coefficient_gradient(terms, merged, field, threads=self._threads)

    def cosines(self, field: Field) -> npt.NDArray[np.float64]:
        """Sums of cosines between gradient and experts; see
        :func:`mergesearch.merging.resident.gradient.expert_cosines`.

        Returns:
            fp64 ``(K, segments)``.

        Raises:
            RecipeError: If the field does not fit the arenas.
            MergesearchError: If gradients were replaced, or never enabled.
        """
        terms = self._terms()
        merged = self._gathered_gradient()
        edges = parts(terms, field.boundaries)
        if self._norms is None or self._norms[0] != edges.tobytes():
            self._norms = edges.tobytes(), expert_norms(terms, edges)
        return expert_cosines(terms, merged, field, self._norms[1], threads=self._threads)

    @contextmanager
    def _through_last_steps(self, gradient: torch.Tensor, field: Field) -> Iterator[None]:
        """The gradient with respect to the weighted sums of tensors that have a last step, as long
        as it is needed.
        """
        before = {spec: self._slice(spec, gradient).clone() for spec in self._finished}
        for spec in before:
            slope = postprocess_gradient(
                self._treatment,
                spec.name,
                self._total(spec, field),
                self._base[spec.start : spec.stop],
            )
            self._slice(spec, gradient).mul_(slope.view(spec.shape))
        try:
            yield
        finally:
            for spec, kept in before.items():
                self._slice(spec, gradient).copy_(kept)

    def _terms(self) -> Terms:
        return Terms(
            self._packing, self._form, self._base, self._basis, tuple(self._factors), self._angles
        )

    def _gathered_gradient(self) -> torch.Tensor:
        """The whole gradient, with what lies in parts of fused parameters."""
        gradient = self._checked_gradient()
        for copied in self._copied:
            assert copied.owner.grad is not None
            self._slice(copied.spec, gradient).copy_(copied.place.of(copied.owner.grad))
        return gradient

    def _checked_gradient(self) -> torch.Tensor:
        """The gradient's buffer, in which the gradient of every parameter must still lie."""
        if self._gradient is None:
            raise MergesearchError(
                "gradient: expected enable_gradient() before the first backward pass"
            )
        first = self._gradient.data_ptr()
        itemsize = self._gradient.itemsize
        held = [(t.grad, first + spec.start * itemsize) for t, spec in self._bound.values()]
        if any(grad is None or grad.data_ptr() != place for grad, place in held) or any(
            copied.owner.grad is None for copied in self._copied
        ):
            raise MergesearchError(
                "gradient: expected every parameter's gradient inside the buffer, received others; "
                "use "
                "clear_gradient() instead of zero_grad()"
            )
        return self._gradient

    def _finish(self, spec: TensorSpec, field: Field) -> torch.Tensor:
        """One tensor again, in the accumulation dtype up to its last step, as an export merges
        it.
        """
        base = self._base[spec.start : spec.stop]
        total = self._total(spec, field)
        done = postprocess(
            self._treatment, spec.name, total.view(spec.shape), base.view(spec.shape), spec.dtype
        )
        return done.to(getattr(torch, spec.dtype))

    def _total(self, spec: TensorSpec, field: Field) -> torch.Tensor:
        """The weighted sum of one tensor that has a last step ``(size,)``, in the accumulation
        dtype.
        """
        part = field.restrict(spec.start, spec.stop)
        angles = self._angles
        at = self._packing.in_row(spec.start)
        assert at is not None, "tensors with a last step are never kept as factors"
        base = self._base[spec.start : spec.stop]
        basis = self._basis[:, at : at + spec.size]
        arc = None if angles is None else angles.restrict(spec.start, spec.stop)
        total = torch.empty_like(base)
        combine(base, list(basis), part, self._form, total, angles=arc, threads=1)
        return total

    def _slice(self, spec: TensorSpec, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return (self.merged if buffer is None else buffer)[spec.start : spec.stop].view(spec.shape)

    def _bind(self) -> None:
        held = dict(_held_tensors(self.model))
        owners = sorted((tensor.data_ptr(), name) for name, tensor in held.items())
        filled = dict.fromkeys(held, 0)
        stored = _as_stored(self.model, held)
        for spec in self.layout.tensors:
            if spec.size == 0:
                continue
            place = stored.get(spec.name)
            name = None if place is None else _owner(place, held, owners)
            if place is None or name is None or tuple(place.shape) != spec.shape:
                raise CheckpointError(
                    f"tensor {spec.name!r}: expected a parameter of {type(self.model).__name__} of "
                    "shape "
                    f"{list(spec.shape)}, found none; choose the auto class that the checkpoint "
                    "was trained with"
                )
            filled[name] += spec.size
            if _memory(place) == _memory(held[name]) and place.dtype == self.merged.dtype:
                self._bound[name] = (held[name], spec)
            else:
                self._copied.append(
                    _Copied(spec, place, held[name], _place_of(place, name, held[name]))
                )
        for name in self._kept:
            place = stored.get(name)
            owner = None if place is None else _owner(place, held, owners)
            if place is not None and owner is not None:
                filled[owner] += place.numel()
        _check_filled(self.model, held, filled)
        for tensor, spec in self._bound.values():
            tensor.data = self._slice(spec)

    def _check_finite(self) -> None:
        # One pass over everything; a sum may overflow though all terms are finite, so tensors are
        # looked at only then.
        if bool(torch.isfinite(self.merged.sum())):
            return
        for spec in self.layout.tensors:
            if not bool(torch.isfinite(self._slice(spec)).all()):
                raise NonFiniteError(f"tensor {spec.name!r}")


def _on_device(factors: StoredFactors, device: str) -> StoredFactors:
    left, right = (as_tensor(factor).to(device) for factor in (factors.left, factors.right))
    return replace(factors, left=left, right=right)


def _check_filled(
    model: nn.Module, held: Mapping[str, torch.Tensor], filled: Mapping[str, int]
) -> None:
    """Every parameter must come from the checkpoint; buffers may be constants that a merge leaves
    alone.
    """
    parameters = {_memory(parameter) for parameter in model.parameters()}
    for name, tensor in held.items():
        if _memory(tensor) in parameters and filled[name] != tensor.numel():
            raise CheckpointError(
                f"parameter {name!r} of {type(model).__name__}: expected in the checkpoint, found "
                f"{filled[name]} of {tensor.numel()} values; choose the auto class that the "
                "checkpoint was trained with"
            )
