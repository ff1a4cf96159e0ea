"""The part of a merge that lies on one device: some tensors, what they are merged from, the result.

A model on one device is one shard. A model over several cards has a shard on each: the tensors of
its layers are numbered anew, so that each card merges its own in one go and reads no other's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mergesearch.merging.resident.binding import tensor_devices
from mergesearch.merging.resident.encodings.packing import Packing
from mergesearch.merging.resident.terms import Terms, on_device
from mergesearch.merging.resident.upload import copy_bytes
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec

_Index = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shard:
    """The tensors of a model that lie on one device.

    Attributes:
        whole: Layout of the model.
        terms: What the tensors are merged from, over a layout of their own.
        merged: The result ``(size,)``, of the length of that layout.
    """

    whole: Layout
    terms: Terms
    merged: torch.Tensor

    @property
    def layout(self) -> Layout:
        """Positions of the tensors in ``merged``."""
        return self.terms.packing.layout

    def slice_of(self, name: str) -> torch.Tensor:
        """The merged weights of one tensor, as a view."""
        return slice_of(self.merged, self.layout.by_name[name])

    def local(self, field: Field) -> tuple[Field, _Index]:
        """A field over the whole flat index, as one over the positions of the shard.

        Returns:
            The field, and for each of its segments the number of the segment it comes from.
        """
        if self.layout is self.whole:
            return field, np.arange(field.segments)
        return local_field(field, self.whole, self.layout)

    def to_whole(
        self, values: npt.NDArray[np.float64], owners: _Index, segments: int
    ) -> npt.NDArray[np.float64]:
        """Sums over local segments, added up by whole ones: ``(K, local) -> (K, segments)``."""
        if self.layout is self.whole:
            return values
        total = np.zeros((segments, len(values)))
        np.add.at(total, owners, values.T)
        return np.ascontiguousarray(total.T)


def slice_of(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """One tensor of a buffer over the flat index, as a view."""
    return buffer[spec.start : spec.stop].view(spec.shape)


def local_field(field: Field, whole: Layout, part: Layout) -> tuple[Field, _Index]:
    """The coefficients of some tensors, over a layout of their own.

    Padding has the coefficients of the tensor before it.

    Returns:
        The field over ``part``, and the segment of ``field`` that each of its segments is of.
    """
    specs = [spec for spec in part.tensors if spec.size]
    cuts = []
    owners = []
    for spec in specs:
        start = whole.by_name[spec.name].start
        first = int(np.searchsorted(field.boundaries, start, side="right")) - 1
        last = int(np.searchsorted(field.boundaries, start + spec.size, side="left"))
        inside = np.maximum(field.boundaries[first:last], start) - start
        cuts.append(inside + spec.start)
        owners.append(np.arange(first, last))
    owner = np.concatenate(owners)
    boundaries = np.append(np.concatenate(cuts), part.size)
    return Field(boundaries, field.values[:, owner]), owner


def whole_shard(terms: Terms, device: str, dtype: torch.dtype) -> Shard:
    """The one shard of a model on one device."""
    layout = terms.packing.layout
    merged = torch.zeros(layout.size, dtype=dtype, device=device)
    return Shard(layout, on_device(terms, device), merged)


def shard_of(terms: Terms, names: Collection[str], device: str, dtype: torch.dtype) -> Shard:
    """The shard of some tensors; nothing of the others reaches the device.

    Args:
        terms: Of the whole model, in main memory.
        names: The tensors.
        device: Where they run.
        dtype: Of the merged weights.
    """
    packing = terms.packing
    whole = packing.layout
    specs = [spec for spec in whole.tensors if spec.name in names]
    layout = Layout.build({spec.name: (spec.shape, spec.dtype) for spec in specs})
    stored = {spec.name: packing.stored[spec.name] for spec in specs if spec.size}
    own = Packing(layout, packing.directions, packing.dtype, stored)
    memory = torch.empty(own.size, dtype=torch.uint8, device=device)
    for name, parts in own.parts.items():
        source = packing.parts[name]
        copy_bytes(terms.memory[source.base : source.stop], memory[parts.base : parts.stop])
    angles = None if terms.angles is None else local_field(terms.angles, whole, layout)[0]
    merged = torch.zeros(layout.size, dtype=dtype, device=device)
    own_terms = Terms(own, terms.form, memory, angles)
    return Shard(whole, own_terms, merged)


def shards_of(
    terms: Terms,
    model: nn.Module,
    device_of: Callable[[str], torch.device],
    dtype: torch.dtype,
) -> tuple[Shard, ...]:
    """A shard for every device that tensors of the model are used on, in the flat index's order."""
    layout = terms.packing.layout
    devices = tensor_devices(model, layout, device_of)
    distinct = list(dict.fromkeys(devices.values()))
    if len(distinct) == 1:
        return (whole_shard(terms, str(distinct[0]), dtype),)
    return tuple(
        shard_of(terms, {n for n, own in devices.items() if own == device}, str(device), dtype)
        for device in distinct
    )
