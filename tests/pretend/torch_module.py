"""``torch.pretend``: what ``torch.cuda`` has, as far as torch or a program asks for it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.accelerator import (
    device_index,
    empty_cache,
    max_memory_reserved,
    memory_stats,
)

#: Cards of the machine where PRETEND_CARDS is not set.
CARDS = 2
#: The product shares memory of such devices by mapping files.
computes_in_host_memory = True


@dataclass(frozen=True)
class Properties:
    """Properties of a card, under the names of ``torch.cuda.get_device_properties``.

    Attributes:
        name: ``pretend card NUMBER``, where the number is that of the machine's card.
        uuid: Identifies the card on the machine.
        total_memory: Bytes.
        major, minor: Compute capability.
        multi_processor_count: Of the card.
    """

    name: str
    uuid: str
    total_memory: int
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 1


def visible_cards() -> list[int]:
    """Numbers of the machine's cards that this process sees, in its order."""
    everything = range(int(os.environ.get("PRETEND_CARDS", CARDS)))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return list(everything)
    return [int(card) for card in shown.split(",") if card.isdigit() and int(card) in everything]


def device_count() -> int:
    return int(torch._C._accelerator_hooks_device_count())


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def current_device() -> int:
    return int(torch.accelerator.current_device_index())


def set_device(device: Any) -> None:
    torch.accelerator.set_device_index(_index(device))


def device(index: Any) -> AbstractContextManager[Any]:
    """Make a card the current one within a block."""
    return device_index(_index(index))  # type: ignore[no-any-return]


def synchronize(device: Any = None) -> None:
    torch.accelerator.synchronize(_index(device))


def memory_allocated(device: Any = None) -> int:
    return int(torch.accelerator.memory_allocated(_index(device)))


def max_memory_allocated(device: Any = None) -> int:
    return int(torch.accelerator.max_memory_allocated(_index(device)))


def memory_reserved(device: Any = None) -> int:
    return memory_allocated(device)


def reset_peak_memory_stats(device: Any = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes."""
    free, total = torch.accelerator.get_memory_info(_index(device))
    return int(free), int(total)


def get_device_properties(device: Any = None) -> Properties:
    index = _index(device)
    number = visible_cards()[index]
    return Properties(f"pretend card {number}", f"PRETEND-{number}", mem_get_info(index)[1])


def get_device_name(device: Any = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    properties = get_device_properties(device)
    return properties.major, properties.minor


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def stream(stream: Any) -> AbstractContextManager[None]:
    """All streams are the default one."""
    return nullcontext()


def manual_seed(seed: int) -> None:
    """Random numbers come from the CPU's generator, which torch seeds as well."""


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


def _index(device: Any) -> int:
    """Number of a card as this process counts: the current one where none is given."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


__all__ = ["empty_cache", "max_memory_reserved", "memory_stats"]
