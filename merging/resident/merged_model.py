"""A resident model that is merged anew for every trial.

Its parameters are views into one buffer of merged weights: a trial writes the buffer, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mergesearch.merging.errors import InputError, MergesearchError, NonFiniteError
from mergesearch.merging.family.heads import Head
from mergesearch.merging.models.layer_bits import Bits, rounded_tensors
from mergesearch.merging.models.loading import widest_dtype
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.binding import Binding, bind
from mergesearch.merging.resident.device_map import device_lookup
from mergesearch.merging.resident.gradient import (
    check_smooth,
    coefficient_gradient,
    expert_cosines,
    expert_norms,
    parts,
)
from mergesearch.merging.resident.gradient_buffer import GradientBuffer
from mergesearch.merging.resident.last_write import Changes, LastWrite
from mergesearch.merging.resident.postprocessing import gradient_of_sums, postprocessed_tensor
from mergesearch.merging.resident.shard import Shard, shards_of
from mergesearch.merging.resident.terms import Terms, combine_terms
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import TensorSpec


class MergedModel:
    """A model bound to merged weights, on one device or over several.

    Attributes:
        model: The bound model. Its parameters change with every :meth:`write`; do not move or cast
            it.
        heads: Models with heads of their own around the same merged weights, by name.
        layout: Positions of the tensors in the flat index.
        shards: What is merged on each device. The merged weights have the common dtype of the
            base's tensors, else the widest of them.
    """

    def __init__(
        self,
        model: nn.Module,
        arenas: Arenas,
        *,
        threads: int = 1,
        device: str = "cpu",
        devices: Mapping[str, str] | None = None,
        head: Head | None = None,
    ) -> None:
        """Bind ``model``, loaded from the base, to the layout of ``arenas``.

        Args:
            model: As :func:`load_model` gives it, in main memory; its parameters are re-pointed.
            arenas: Base and basis.
            threads: CPU threads of :meth:`write`.
            device: ``cpu`` reads the mapped arenas; elsewhere they are copied to the device.
            devices: For a model over several devices: module -> device, as in
                :func:`mergesearch.merging.resident.device_map.device_map`.
            head: What the model has for itself and is not merged.

        Raises:
            CheckpointError: If a stored tensor is no part of the model, or a parameter is not
                stored.
        """
        self.model = model
        self.heads: dict[str, nn.Module] = {}
        self.layout = arenas.layout
        self._threads = threads
        self._special = arenas.special
        specs = [spec for spec in arenas.layout.tensors if spec.size]
        dtype = widest_dtype(spec.dtype for spec in arenas.layout.tensors)
        self._rounded = [spec for spec in specs if getattr(torch, spec.dtype) != dtype]
        self._postprocessed = {
            spec.name for spec in specs if spec.name in arenas.special.postprocessed
        }
        device_of = device_lookup(device, devices)
        self.shards = shards_of(Terms.of(arenas), model, device_of, dtype)
        self._gradient: GradientBuffer | None = None
        self._norms: tuple[bytes, list[npt.NDArray[np.float64]]] | None = None
        self._slices = {
            spec.name: shard.slice_of(spec.name)
            for shard in self.shards
            for spec in shard.layout.tensors
        }
        self._copied = arenas.copied
        self._device_of = device_of
        self._binding = self._bound(model, head)
        self._bindings = [self._binding]
        self._last = LastWrite(self.shards, self._bindings)

    @property
    def merged(self) -> torch.Tensor:
        """The merged weights of a model on one device ``(size,)``."""
        (shard,) = self.shards
        return shard.merged

    @property
    def placed(self) -> frozenset[int]:
        """Ids of the parameters that lie where the merge does: views into it, and copies of it."""
        views = (t for binding in self._bindings for t, _ in binding.bound.values())
        copies = (one.owner for binding in self._bindings for one in binding.copied)
        return frozenset(id(tensor) for tensor in (*views, *copies))

    @property
    def has_copies(self) -> bool:
        """Whether some tensors are copied into the parameters of each model."""
        return any(binding.copied for binding in self._bindings)

    def add_head(self, name: str, model: nn.Module, head: Head) -> None:
        """Bind another model to the same merged weights; no copy of these is made.

        Args:
            name: Its key in :attr:`heads`.
            model: In main memory; it shares all stored tensors of the layout.
            head: What it has for itself.

        Raises:
            CheckpointError: As for the first model.
            MergesearchError: If gradients are enabled already.
        """
        if self._gradient is not None:
            raise MergesearchError("heads: expected all of them before enable_gradient()")
        if model is not self.model:
            self._bindings.append(self._bound(model, head))
        self._last.extend()
        self.heads[name] = model

    def _bound(self, model: nn.Module, head: Head | None) -> Binding:
        names = {} if head is None else head.renamed
        own = () if head is None else head.names
        kept = {*own, *(names.get(name, name) for name in self._copied)}
        return bind(model, self.layout, self._slices, kept, self._device_of, names)

    def write(self, field: Field, bits: Bits = ()) -> None:
        """Merge with the coefficients of ``field`` into the model.

        Where the last write's coefficients have the same bits, its weights are left as they are:
        the model holds what a whole merge would write (:class:`LastWrite`).

        Args:
            field: The coefficients.
            bits: Tensors that are rounded after the merge, and to how many bits.

        Raises:
            RecipeError: If the field does not fit the arenas.
            NonFiniteError: If a merged tensor holds NaN or infinity; the model is then of no use
                until the next write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        with torch.no_grad():
            fields = [shard.local(field)[0] for shard in self.shards]
            changes = self._last.changes(fields, bits)
            for shard, part, changed in zip(self.shards, fields, changes, strict=True):
                self._merge(shard, part, changed)
            self._finish(bits, changes)
        self._last.keep(fields, bits)

    def _merge(self, shard: Shard, field: Field, changes: Changes) -> None:
        """Merge what has changed of a shard, each tensor in its own dtype."""
        only = changes.ranges
        combine_terms(shard.terms, field, shard.merged, threads=self._threads, only=only)
        for spec in self._postprocessed_of(shard):
            if spec.name in changes.names:
                tensor = postprocessed_tensor(shard.terms, self._special, spec, field)
                self._slices[spec.name].copy_(tensor)
        for spec in self._rounded:
            if spec.name in changes.names and spec.name not in self._postprocessed:
                weights = self._slices[spec.name]
                weights.copy_(weights.to(getattr(torch, spec.dtype)))

    def forget(self) -> None:
        """Let the next write merge everything.

        Call it where weights may have been written to past torch's own operations.
        """
        self._last.forget()

    def write_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], bits: Bits = ()) -> None:
        """Write merged tensors that come from elsewhere than the arenas.

        Args:
            tensors: Name and value of every tensor of the layout.
            bits: Tensors that are rounded, and to how many bits.

        Raises:
            NonFiniteError: If one holds NaN or infinity; the model is then of no use until the next
                write.
            MergesearchError: If the model was moved or cast since it was bound.
        """
        self.check_binding()
        self._last.forget()
        with torch.no_grad():
            for name, tensor in tensors:
                self._slices[name].copy_(tensor)
            self._finish(bits, self._last.everything)

    def _finish(self, bits: Bits, changes: Sequence[Changes]) -> None:
        """What follows every merge: rounding, copies, and the check of all new values."""
        changed = frozenset[str]().union(*(one.names for one in changes))
        due = [pair for pair in bits if pair[0] in changed or pair[0] not in self._slices]
        for name, rounded in rounded_tensors(due, self._stored, self._threads):
            self._slices[name].copy_(rounded)
        for binding in self._bindings:
            binding.update_copies(changed)
        pairs = zip(self.shards, changes, strict=True)
        if not all(_is_finite(shard, each, self._threads) for shard, each in pairs):
            self._check_finite()

    def _stored(self, name: str) -> torch.Tensor:
        """A merged tensor in the dtype that it is stored in."""
        dtype: torch.dtype = getattr(torch, self.layout.by_name[name].dtype)
        return self._slices[name].to(dtype)

    def check_binding(self) -> None:
        """Check that every bound parameter still lies at its position in the buffer.

        Raises:
            MergesearchError: If one does not.
        """
        for binding in self._bindings:
            binding.check()

    def enable_gradient(self) -> None:
        """Let backward passes through the model accumulate into one buffer.

        Raises:
            InputError: If the merge is not smooth in its coefficients, or no derivative of it
                reaches them.
        """
        if self._gradient is not None:
            return
        check_smooth(self.shards[0].terms)
        if self._special.statistics:
            raise InputError(
                "gradient: expected no merged running statistics, received "
                f"{len(self._special.statistics)}, which no backward pass reaches; set "
                "special.batch_norm: base, or choose a strategy without gradients"
            )
        self._gradient = GradientBuffer(self._bindings, self.shards)

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
        total = np.zeros(field.values.shape)
        buffers = self._enabled_gradient().gathered()
        for shard, merged in zip(self.shards, buffers, strict=True):
            part, owners = shard.local(field)
            terms = shard.terms
            specs = self._postprocessed_of(shard)
            with gradient_of_sums(terms, self._special, specs, merged, part):
                own = coefficient_gradient(terms, merged, part, threads=self._threads)
            total += shard.to_whole(own, owners, field.segments)
        return total

    def cosines(self, field: Field) -> npt.NDArray[np.float64]:
        """Sums of cosines between gradient and experts.

        See :func:`mergesearch.merging.resident.gradient.expert_cosines`.

        Returns:
            fp64 ``(K, segments)``.

        Raises:
            RecipeError: If the field does not fit the arenas.
            MergesearchError: If gradients were replaced, or never enabled.
        """
        total = np.zeros(field.values.shape)
        buffers = self._enabled_gradient().gathered()
        norms = self._expert_norms(field)
        for shard, merged, own in zip(self.shards, buffers, norms, strict=True):
            part, owners = shard.local(field)
            cosines = expert_cosines(shard.terms, merged, part, own, threads=self._threads)
            total += shard.to_whole(cosines, owners, field.segments)
        return total

    def _expert_norms(self, field: Field) -> list[npt.NDArray[np.float64]]:
        """Norms of the experts over the parts of each shard, kept while segments stay the same."""
        key = field.boundaries.tobytes()
        if self._norms is None or self._norms[0] != key:
            norms = [
                expert_norms(shard.terms, parts(shard.terms, shard.local(field)[0].boundaries))
                for shard in self.shards
            ]
            self._norms = key, norms
        return self._norms[1]

    def _postprocessed_of(self, shard: Shard) -> list[TensorSpec]:
        return [spec for spec in shard.layout.tensors if spec.name in self._postprocessed]

    def _enabled_gradient(self) -> GradientBuffer:
        check_smooth(self.shards[0].terms)
        if self._gradient is None:
            raise MergesearchError(
                "gradient: expected enable_gradient() before the first backward pass"
            )
        return self._gradient

    def _check_finite(self) -> None:
        """Look at every tensor: a sum may overflow though all terms are finite.

        Raises:
            NonFiniteError: If one is not finite.
        """
        for name, weights in self._slices.items():
            if not bool(torch.isfinite(weights).all()):
                raise NonFiniteError(f"tensor {name!r}")


def _is_finite(shard: Shard, changes: Changes, threads: int) -> bool:
    """Whether what was merged of a shard is surely finite, in one pass over it."""
    if changes.ranges is None:
        return bool(torch.isfinite(shard.merged.sum()))
    from mergesearch.merging.resident.finite import finite_in

    return finite_in(shard.merged, changes.ranges, threads)
