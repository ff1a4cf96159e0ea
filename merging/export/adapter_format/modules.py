"""Which module of a model each stored tensor belongs to, and whether an adapter can change it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.skeleton import InMemory, Skeleton
from mergesearch.merging.checkpoints.tied import is_vocabulary_head
from mergesearch.merging.tensors.roles import classify

#: How a module keeps its matrix: (out, in); (in, out), as the Conv1D of GPT-2 does; rows by token;
#: or (out, in, kernel).
Kind = Literal["linear", "transposed", "embedding", "convolution"]


@dataclass(frozen=True)
class AdaptedModule:
    """A module that an adapter can change.

    Attributes:
        name: Of the module in the model.
        kind: How it keeps its matrix.
    """

    name: str
    kind: Kind


@dataclass(frozen=True, eq=False)
class ModelModules:
    """The modules of a model, by the names of its stored tensors.

    Attributes:
        skeleton: The model without weights; None if transformers cannot build it: then tensors are
            taken to have the names of its parameters, and matrices to be of linear layers.
        in_memory: Stored name -> the parameter that it becomes.
        saved: Modules that experts have stored whole, as their adapters name them.
    """

    skeleton: Skeleton | None
    in_memory: Mapping[str, InMemory]
    saved: frozenset[str]

    @classmethod
    def of(
        cls, base: Checkpoint, stored_as: Mapping[str, str], saved: Collection[str]
    ) -> ModelModules:
        """The modules of the model of a base.

        Args:
            base: With the head that the model has.
            stored_as: Name of a tensor -> its name in that model, where it is another.
            saved: As the attribute.
        """
        skeleton = Skeleton.of(base.config) if base.config else None
        names = {name: stored_as.get(name, name) for name in base.tensors}
        found = {n: InMemory(n, False) for n in names.values()}
        if skeleton is not None:
            found = skeleton.names_in_memory(names.values())
        in_memory = {name: found[stored] for name, stored in names.items()}
        return cls(skeleton, in_memory, frozenset(saved))

    @property
    def mixes_orders(self) -> bool:
        """Whether some matrices are stored as (in, out)."""
        if self.skeleton is None:
            return False
        return any(_kind_of(module) == "transposed" for module in self.skeleton.model.modules())

    def adapted(self, name: str, shape: Sequence[int]) -> AdaptedModule | None:
        """The module whose matrix a tensor is, or None where an adapter cannot change it.

        It cannot change vectors, parts of fused parameters, and one of two tied tensors.
        """
        place = self.in_memory[name]
        module, _, parameter = place.name.rpartition(".")
        if place.is_part or parameter != "weight" or len(shape) < 2:
            return None
        if self.skeleton is None:
            plain = len(shape) == 2 and classify(name).module not in ("embedding", "norm")
            return AdaptedModule(module, "linear") if plain else None
        if self._is_tied(place.name):
            return None
        kind = _kind_of(self.skeleton.model.get_submodule(module))
        return None if kind is None else AdaptedModule(module, kind)

    def saved_module(self, name: str) -> str | None:
        """The module to store whole for a tensor: a head, or one that experts saved."""
        path = self.in_memory[name].name.split(".")[:-1]
        for length in range(len(path), 0, -1):
            module = ".".join(path[:length])
            if any(f".{module}".endswith(f".{saved}") for saved in self.saved):
                return module
        if not path or not _is_head(name) or self._is_tied(self.in_memory[name].name):
            return None
        return path[0] if self._is_all_head(path[0]) else ".".join(path)

    def tensors_of(self, module: str) -> list[str]:
        """Stored names of the tensors of a module."""
        return [n for n, place in self.in_memory.items() if place.name.startswith(f"{module}.")]

    def _is_all_head(self, module: str) -> bool:
        return all(_is_head(name) for name in self.tensors_of(module))

    def _is_tied(self, parameter: str) -> bool:
        if self.skeleton is None:
            return False
        state = self.skeleton.model.state_dict(keep_vars=True)
        own = state.get(parameter)
        return any(other is own for key, other in state.items() if key != parameter)


def _is_head(name: str) -> bool:
    return classify(name).module == "head" and not is_vocabulary_head(name)


def _kind_of(module: Any) -> Kind | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return "convolution"
    return None
