"""A resident model that is merged anew for every trial.

Its parameters are views into one buffer of merged weights: a trial writes the buffer, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mergesearch.merging.errors import InputError, MergesearchError, NonFiniteError
from mergesearch.merging.models.loading import widest_dtype
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.binding import bind, slice_of
from mergesearch.merging.resident.gradient import (
    check_smooth,
    coefficient_gradient,
    expert_cosines,
    expert_norms,
    parts,
)
from mergesearch.merging.resident.gradient_buffer import GradientBuffer
from mergesearch.merging.resident.packing import combine_packed
from mergesearch.merging.resident.postprocessing import gradient_of_sums, postprocessed_tensor
from mergesearch.merging.resident.terms import Terms, on_device
from mergesearch.merging.tensors.field import Field


class MergedModel:
    """A model bound to one merged buffer.

    Attributes:
        model: The bound model. Its parameters change with every :meth:`write`; do not move or cast
            it.
        layout: Positions of the tensors in the buffer.
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
            CheckpointError: If a stored tensor is no part of the model, or a parameter is not
                stored.
        """
        self.model = model.to(device)
        self.layout = arenas.layout
        self._threads = threads
        self._terms = on_device(Terms.of(arenas), device)
        self._special = arenas.special
        specs = [spec for spec in arenas.layout.tensors if spec.size]
        dtype = widest_dtype(spec.dtype for spec in arenas.layout.tensors)
        self._rounded = [spec for spec in specs if getattr(torch, spec.dtype) != dtype]
        self._postprocessed = [spec for spec in specs if spec.name in arenas.special.postprocessed]
        self.merged = torch.zeros(arenas.layout.size, dtype=dtype, device=device)
        self._gradient: GradientBuffer | None = None
        self._norms: tuple[bytes, npt.NDArray[np.float64]] | None = None
        self._binding = bind(self.model, self.layout, self.merged, arenas.copied)

    def write(self, field: Field) -> None:
        """Merge with the coefficients of ``field`` into the model.

        Raises:
            RecipeError: If the field does not fit the arenas.
            NonFiniteError: If a merged tensor holds NaN or infinity; the model is then of no use
                until the next write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        terms = self._terms
        with torch.no_grad():
            combine_packed(
                terms.packing,
                terms.base,
                terms.rows,
                terms.factors,
                field,
                terms.form,
                self.merged,
                angles=terms.angles,
                threads=self._threads,
            )
            for spec in self._rounded:
                part = slice_of(self.merged, spec)
                part.copy_(part.to(getattr(torch, spec.dtype)))
            for spec in self._postprocessed:
                tensor = postprocessed_tensor(terms, self._special, spec, field)
                slice_of(self.merged, spec).copy_(tensor)
            self._binding.update_copies()
            self._check_finite()

    def write_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write merged tensors that come from elsewhere than the arenas.

        Args:
            tensors: Name and value of every tensor of the layout.

        Raises:
            NonFiniteError: If one holds NaN or infinity; the model is then of no use until the next
                write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        with torch.no_grad():
            for name, tensor in tensors:
                slice_of(self.merged, self.layout.by_name[name]).copy_(tensor)
            self._binding.update_copies()
            self._check_finite()

    def check_binding(self) -> None:
        """Check that every bound parameter still lies at its position in the buffer.

        Raises:
            MergesearchError: If one does not.
        """
        self._binding.check()

    def enable_gradient(self) -> None:
        """Let backward passes through the model accumulate into one buffer.

        Raises:
            InputError: If the merge is not smooth in its coefficients, or no derivative of it
                reaches them.
        """
        if self._gradient is not None:
            return
        check_smooth(self._terms)
        if self._special.statistics:
            raise InputError(
                "gradient: expected no merged running statistics, received "
                f"{len(self._special.statistics)}, which no backward pass reaches; set "
                "special.batch_norm: base, or choose a strategy without gradients"
            )
        self._gradient = GradientBuffer(self._binding)

    def clear_gradient(self) -> None:
        """Forget what backward passes have accumulated.

        Raises:
            MergesearchError: If gradients were replaced, or never enabled.
        """
        self._enabled_gradient().clear()

    def gradient(self, field: Field) -> npt.NDArray[np.float64]:
        """Derivatives of the loss with respect to ``field.values``.

        They come from what backward passes have accumulated. Rounding to the model's dtype is
        passed straight through.

        Args:
            field: The one that was written last.

        Returns:
            fp64 ``(K, segments)``.

        Raises:
            RecipeError: If the field does not fit the arenas.
            MergesearchError: If gradients were replaced, or never enabled.
        """
        terms = self._terms
        merged = self._enabled_gradient().gathered()
        with gradient_of_sums(terms, self._special, self._postprocessed, merged, field):
            return coefficient_gradient(terms, merged, field, threads=self._threads)

    def cosines(self, field: Field) -> npt.NDArray[np.float64]:
        """Sums of cosines between gradient and experts.

        See :func:`mergesearch.merging.resident.gradient.expert_cosines`.

        Returns:
            fp64 ``(K, segments)``.

        Raises:
            RecipeError: If the field does not fit the arenas.
            MergesearchError: If gradients were replaced, or never enabled.
        """
        terms = self._terms
        merged = self._enabled_gradient().gathered()
        edges = parts(terms, field.boundaries)
        if self._norms is None or self._norms[0] != edges.tobytes():
            self._norms = edges.tobytes(), expert_norms(terms, edges)
        return expert_cosines(terms, merged, field, self._norms[1], threads=self._threads)

    def _enabled_gradient(self) -> GradientBuffer:
        check_smooth(self._terms)
        if self._gradient is None:
            raise MergesearchError(
                "gradient: expected enable_gradient() before the first backward pass"
            )
        return self._gradient

    def _check_finite(self) -> None:
        # One pass over everything; a sum may overflow though all terms are finite, so tensors are
        # looked at only then.
        if bool(torch.isfinite(self.merged.sum())):
            return
        for spec in self.layout.tensors:
            if not bool(torch.isfinite(slice_of(self.merged, spec)).all()):
                raise NonFiniteError(f"tensor {spec.name!r}")
