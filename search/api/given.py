"""What a program gives beside plain data: functions, classes and weights, and their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.extensions.references import reference_to

#: Sections of a study -> keys that may hold a function or class instead of a name.
_EVALUATOR_KEYS = ("function", "model_class")


class Given:
    """Objects of a program, collected while a study is made of plain data and them.

    Args:
        folder: Where weights are written that are in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, Any] = {}
        self._folder = folder
        self._weights: dict[Path, dict[str, Any]] = {}

    def plain(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        """The sections with names and paths in the place of objects.

        Raises:
            InputError: If an object cannot be named, or weights cannot be written.
        """
        data = dict(sections)
        for key in ("operator", "strategy"):
            if key in data:
                data[key] = self._named(data[key])
        if isinstance(data.get("evaluators"), list | tuple):
            data["evaluators"] = [self._evaluator(each) for each in data["evaluators"]]
        if "base" in data:
            data["base"] = self._path(data["base"], "base")
        experts = data.get("experts")
        if isinstance(experts, Mapping):
            data["experts"] = {
                str(name): self._path(weights, f"experts.{name}")
                for name, weights in experts.items()
            }
        elif isinstance(experts, list | tuple):
            data["experts"] = [self._path(each, "experts") for each in experts]
        if self.objects:
            data.setdefault("allow_code", True)
        return data

    def _named(self, section: Any) -> Any:
        """An operator or strategy, or its section, by name."""
        if isinstance(section, Mapping):
            name = section.get("name")
            return dict(section) | ({} if name is None else {"name": self._name(name)})
        return self._name(section)

    def _evaluator(self, section: Any) -> Any:
        if not isinstance(section, Mapping):
            return section
        return {
            key: self._name(value) if key in _EVALUATOR_KEYS else value
            for key, value in section.items()
        }

    def _name(self, value: Any) -> Any:
        """The name of an object; names and missing values stay as they are."""
        if value is None or isinstance(value, str):
            return value
        name = reference_to(value)
        if self.objects.setdefault(name, value) is not value:
            raise InputError(
                f"{name}: expected one object of this name, received two; define them with def or "
                "class under names of their own"
            )
        return name

    def _path(self, weights: Any, where: str) -> str:
        """The path of weights; for those in memory, of a file that :meth:`write` makes."""
        if isinstance(weights, str | os.PathLike):
            return str(weights)
        state = weights.state_dict() if hasattr(weights, "state_dict") else weights
        checked = _checked(state, where)
        name = f"{where.rpartition('.')[2]}-{_digest(checked)}.safetensors"
        path = self._folder.absolute() / name
        self._weights[path] = checked
        return str(path)

    def write(self) -> None:
        """Write the weights that are in memory, unless they are there already.

        Raises:
            InputError: If they cannot be written.
        """
        from safetensors.torch import save_file

        for path, state in self._weights.items():
            if path.is_file():
                continue
            part = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(state, part)
                part.replace(path)
            except OSError as error:
                raise InputError(
                    f"{path}: expected to write weights, received: {error.strerror or error}; "
                    "choose another run folder"
                ) from None
        self._weights.clear()


def _checked(state: Any, where: str) -> dict[str, Any]:
    """A state dict as safetensors takes it: contiguous tensors in main memory, none shared.

    Raises:
        InputError: If it is something else.
    """
    import torch

    if not isinstance(state, Mapping) or not state:
        raise InputError(
            f"{where}: expected a path, a torch module or a state dict, received "
            f"{type(state).__name__}"
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{where}: expected a state dict of tensors, received {type(tensor).__name__} for "
                f"{name!r}"
            )
    return {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())
    }


def _digest(state: Mapping[str, Any]) -> str:
    """Hash of names, types, shapes and numbers."""
    import torch

    hashed = hashlib.sha256()
    for name, tensor in state.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
