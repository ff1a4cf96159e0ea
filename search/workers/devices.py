"""What a worker computes on: the card, its driver, and settings that change bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.tensors.accelerator import device_module

if TYPE_CHECKING:
    import torch

#: Where the kernel module says which version it is.
DRIVER_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class Device:
    """A device and the settings under which it computes; None where there is no such thing.

    Attributes:
        name: Of the card, or None for the CPU.
        count: Cards that the worker sees.
        capability: Compute capability of the card, such as ``9.0``.
        driver: Version of the card's driver.
        cuda: Version of CUDA that torch was built for.
        tf32: Whether fp32 products are rounded to TF32.
        deterministic: Whether torch refuses operations whose bits differ between calls.
        attention: Implementation of attention that the model uses.
        dtype: Of the model's weights and outputs, or None without a model.
    """

    name: str | None = None
    count: int | None = None
    capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    tf32: bool | None = None
    deterministic: bool | None = None
    attention: str | None = None
    dtype: str | None = None

    def __str__(self) -> str:
        """The card and its software, or ``the CPU``."""
        if self.name is None:
            return "the CPU"
        versions = {"driver": self.driver, "CUDA": self.cuda}
        known = [f"{what} {version}" for what, version in versions.items() if version is not None]
        return f"{self.name} ({', '.join(known)})" if known else self.name

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def device_from(recorded: Mapping[str, Any]) -> Device:
    """A recorded device; keys of later versions are left out."""
    known = {field.name for field in fields(Device)}
    return Device(**{key: value for key, value in recorded.items() if key in known})


def current_device(model: Any = None, kind: str = "cpu") -> Device:
    """The device that this process computes on.

    Args:
        model: The resident model, if there is one.
        kind: Type of the device, for a process without a model.
    """
    weight = None if model is None else next(model.parameters(), None)
    where = kind if weight is None else weight.device.type
    settings: dict[str, Any] = {
        "attention": None if model is None else _attention(model),
        "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
    }
    if where == "cpu":
        return Device(**settings)
    return Device(**_card(where if weight is None else weight.device), **settings)


def _attention(model: Any) -> str | None:
    """The implementation that the outermost transformers model within a module uses."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = (getattr(config, "_attn_implementation", None) for config in configs)
    return next((name for name in found if isinstance(name, str)), None)


def _card(device: torch.device | str) -> dict[str, Any]:
    """What is known of a card, and the settings of torch that change its bits."""
    import torch

    module = device_module(device)
    properties = module.get_device_properties(device)
    return {
        "name": properties.name,
        "count": module.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": DRIVER_VERSION.read_text().strip() if DRIVER_VERSION.is_file() else None,
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
