"""The accelerator that torch finds on this machine, whoever made it."""

from __future__ import annotations

from typing import Any

from mergesearch.merging.errors import InputError

#: What stands for the accelerator until it is known on which machine the work is done.
ACCELERATOR = "accelerator"


def accelerator() -> str | None:
    """The type of this machine's accelerator as torch names it, or None where torch finds none."""
    import torch

    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def device_here(wanted: str) -> str:
    """The device that ``wanted`` stands for on this machine.

    Args:
        wanted: :data:`ACCELERATOR`, or a device as torch names it.

    Raises:
        InputError: If torch finds no accelerator.
    """
    if wanted != ACCELERATOR:
        return wanted
    found = accelerator()
    if found is None:
        import torch

        raise InputError(
            "workers.gpus: expected a GPU that torch can use, found none with torch "
            f"{torch.__version__}; install a torch that is built for it, or set workers.gpus: 0"
        )
    return found


def device_or_cpu(wanted: str) -> str:
    """As :func:`device_here`, but ``cpu`` where torch finds no accelerator."""
    return (accelerator() or "cpu") if wanted == ACCELERATOR else wanted


def device_module(device: Any) -> Any:
    """Torch's functions for devices of a type, such as ``torch.cuda``."""
    import torch

    return torch.get_device_module(device)


def empty_cache() -> None:
    """Give memory that torch keeps for later allocations back to the device, if there is one."""
    found = accelerator()
    if found is not None:
        device_module(found).empty_cache()
