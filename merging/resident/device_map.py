"""Which layers of a model lie on which device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mergesearch.merging.errors import InputError
from mergesearch.merging.tensors.accelerator import device_module

#: Share of a device's memory that weights may take; the rest is for activations.
WEIGHTS_SHARE = 0.8


def device_lookup(device: str, devices: Mapping[str, str] | None) -> Callable[[str], torch.device]:
    """Name of a parameter -> its device: the one device, or that of the module it belongs to.

    Args:
        device: Where there is one.
        devices: Module -> device, as :func:`device_map` gives it; None for one device. What it does
            not know, such as the head of another model, lies on the last device.
    """
    if devices is None:
        return lambda _name: torch.device(device)

    last = [*devices.values()][-1]

    def of(name: str) -> torch.device:
        module = name
        while module not in devices and module:
            module = module.rpartition(".")[0]
        return torch.device(devices.get(module, last))

    return of


def device_map(
    model: nn.Module, memory: Mapping[str, float], needed: float = 1.0
) -> dict[str, str]:
    """Module or parameter -> device, in the order of the layers, as evenly as whole blocks allow.

    Modules that share a parameter lie on one device.

    Args:
        model: In main memory.
        memory: Device -> bytes that it has.
        needed: Bytes of a device that a byte of the model's weights takes there: 1 for the weights
            alone, more where what they are merged from lies beside them.

    Raises:
        InputError: If the weights do not fit.
    """
    whole = set(getattr(model, "_no_split_modules", None) or [])
    units = list(_units(model, whole))
    sizes = _new_bytes([tensors for _, tensors in units])
    total = sum(sizes)
    names = list(memory)
    room = [WEIGHTS_SHARE * memory[name] / needed for name in names]
    used = [0] * len(names)
    at = 0
    owners: dict[int, int] = {}
    result = {}
    for (name, tensors), size in zip(units, sizes, strict=True):
        # the next device from where most of the unit would lie beyond an even share
        share = total * (at + 1) / len(names)
        if at + 1 < len(names) and (sum(used) + size / 2 > share or used[at] + size > room[at]):
            at += 1
        shared = [owners[id(tensor)] for tensor in tensors if id(tensor) in owners]
        device = shared[0] if shared else at
        used[device] += size
        owners |= {id(tensor): device for tensor in tensors}
        result[name] = names[device]
    if any(taken > space for taken, space in zip(used, room, strict=True)):
        raise InputError(
            f"workers.gpus: expected {total:,} bytes of weights to fit into {int(sum(room)):,} on "
            f"{len(memory)} GPUs ({WEIGHTS_SHARE:.0%} of each), received layers of "
            f"{', '.join(f'{taken:,}' for taken in used)}; give each worker more"
        )
    return result


def _units(
    module: nn.Module, whole: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """What is never cut, in order: blocks, modules without children, and parameters beside these.

    Each is its name and its parameters and buffers.
    """
    for name, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        yield f"{prefix}{name}", [tensor]
    for name, child in module.named_children():
        if type(child).__name__ in whole or not list(child.children()):
            yield f"{prefix}{name}", [*child.parameters(), *child.buffers()]
        else:
            yield from _units(child, whole, f"{prefix}{name}.")


def _new_bytes(units: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """Bytes of every unit that no unit before it has."""
    seen: set[int] = set()
    sizes = []
    for tensors in units:
        own = {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in seen}
        sizes.append(sum(own.values()))
        seen |= own.keys()
    return sizes


def device_memory(kind: str, count: int) -> dict[str, float]:
    """Device -> bytes of memory, for the first ``count`` devices of a type that there are."""
    module = device_module(kind)
    return {
        f"{kind}:{index}": module.get_device_properties(index).total_memory
        for index in range(min(torch.accelerator.device_count(), count))
    }


def place(
    model: nn.Module, device_of: Callable[[str], torch.device], but: Collection[int] = ()
) -> None:
    """Bring parameters and buffers to the devices on which they are used.

    Each keeps its identity, so that tied ones stay tied.

    Args:
        model: Whose they are.
        device_of: Name of a parameter or buffer -> its device.
        but: Ids of those that are left alone.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in but:
            tensor.data = tensor.data.to(device_of(name))


def settled(model: nn.Module, fixed: Collection[int]) -> dict[str, str]:
    """Module or parameter -> the device that it lies on, each whole unit on one.

    Args:
        model: Some of whose parameters lie where those of another model do.
        fixed: Ids of these; what is beside them in a unit is brought to them.
    """
    result = {}
    for name, tensors in _units(model, set(getattr(model, "_no_split_modules", None) or [])):
        if not tensors:
            continue
        device = next((one for one in tensors if id(one) in fixed), tensors[0]).device
        for tensor in tensors:
            if id(tensor) not in fixed:
                tensor.data = tensor.data.to(device)
        result[name] = str(device)
    return result


def dispatch(model: nn.Module, devices: Mapping[str, str]) -> nn.Module:
    """Let activations travel between the devices of a model in its forward pass.

    Every module of the map receives its inputs on its own device, and what the model returns lies
    where its inputs came from. Parameters are left alone: they must be where they belong.

    Args:
        model: Whose parameters lie on the devices.
        devices: Module -> device.

    Returns:
        The model.
    """
    from accelerate.utils import send_to_device

    def receive(device: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            return send_to_device(args, device), send_to_device(kwargs, device)

        return hook

    def give_back(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        return send_to_device(output, inputs[0].device) if inputs else output

    modules = dict(model.named_modules())
    for name, device in devices.items():
        if name in modules:  # others are parameters beside modules
            modules[name].register_forward_pre_hook(receive(device), with_kwargs=True)
    model.register_forward_hook(give_back, with_kwargs=True)
    return model
