"""A resident model whose layers lie on several GPUs, merged in main memory.

This is for cards that hold the weights of a model but not what they are merged from. Base and rows
stay mapped in main memory, where a trial's merge is the same one pass, bit for bit, as for a model
on the CPU; its result is then copied to the layers' devices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mergesearch.merging.errors import InputError
from mergesearch.merging.models.layer_bits import Bits
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.tensors.field import Field


class ShardedModel(MergedModel):
    """A model that runs on several devices, bound to one merged buffer in main memory.

    Attributes:
        model: The model on its devices; it follows every :meth:`write`.
    """

    def __init__(
        self, host: nn.Module, model: nn.Module, arenas: Arenas, *, threads: int = 1
    ) -> None:
        """Bind ``host`` to the buffer, and let ``model`` follow it.

        Args:
            host: The model in main memory, as
                :func:`mergesearch.merging.models.loading.load_model` gives it.
            model: The same model, dispatched to devices.
            arenas: Base and basis.
            threads: CPU threads of :meth:`write`.

        Raises:
            CheckpointError: As :class:`MergedModel`.
        """
        super().__init__(host, arenas, threads=threads)
        here = host.state_dict(keep_vars=True)
        there = model.state_dict(keep_vars=True)
        self._followers = [
            (there[name], tensor) for name, tensor in here.items() if tensor.is_floating_point()
        ]
        self.model = model

    def write(self, field: Field, bits: Bits = ()) -> None:
        """Merge in main memory, then copy to the devices.

        Raises as :meth:`MergedModel.write`.
        """
        super().write(field, bits)
        self._follow()

    def write_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], bits: Bits = ()) -> None:
        """Write merged tensors, then copy them to the devices.

        Raises as :meth:`MergedModel.write_tensors`.
        """
        super().write_tensors(tensors, bits)
        self._follow()

    def enable_gradient(self) -> None:
        """Refuse gradients, which would have to be gathered from the devices at every step.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "workers.gpus: expected at most 1 for a strategy that follows gradients, received a "
            "model on several; lower it"
        )

    def _follow(self) -> None:
        with torch.no_grad():
            for follower, tensor in self._followers:
                follower.copy_(tensor, non_blocking=True)
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
