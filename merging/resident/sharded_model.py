"""A resident model whose layers lie on several GPUs, merged in main memory.

Base and basis of a model that needs several GPUs rarely fit beside it. They stay mapped in main
memory, where a trial's merge is the same one pass, bit for bit, as for a model on the CPU; its
result is then copied to the layers' devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mergesearch.merging.errors import InputError
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.tensors.field import Field

#: Share of a device's memory that weights may take; the rest is for activations.
WEIGHTS_SHARE = 0.8


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

    def write(self, field: Field) -> None:
        """Merge in main memory, then copy to the devices.

        Raises as :meth:`MergedModel.write`.
        """
        super().write(field)
        self._follow()

    def write_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write merged tensors, then copy them to the devices.

        Raises as :meth:`MergedModel.write_tensors`.
        """
        super().write_tensors(tensors)
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
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def dispatch(model: nn.Module, devices: Sequence[int]) -> nn.Module:
    """Spread the layers of a model over GPUs; activations travel between them in the forward pass.

    Raises:
        InputError: If it does not fit.
    """
    from accelerate import dispatch_model

    memory = {device: torch.cuda.get_device_properties(device).total_memory for device in devices}
    dispatched: nn.Module = dispatch_model(model, device_map=device_map(model, memory))
    return dispatched


def device_map(model: nn.Module, memory: Mapping[int, float]) -> dict[str, Any]:
    """Module -> device, as evenly as whole blocks allow.

    Args:
        model: In main memory.
        memory: GPU -> bytes that it has.

    Raises:
        InputError: If the weights do not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    room = {device: int(WEIGHTS_SHARE * size) for device, size in memory.items()}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    balanced = get_balanced_memory(model, max_memory=dict(room), no_split_module_classes=whole)
    device_of: dict[str, Any] = infer_auto_device_map(
        model, max_memory=balanced, no_split_module_classes=whole
    )
    elsewhere = sorted(
        {str(device) for device in device_of.values()} - {str(device) for device in memory}
    )
    if elsewhere:
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        raise InputError(
            f"workers.gpus: expected {size:,} bytes of weights to fit into {sum(room.values()):,} "
            f"on {len(memory)} GPUs ({WEIGHTS_SHARE:.0%} of each), some would lie on "
            f"{', '.join(elsewhere)}; give each worker more"
        )
    return device_of
