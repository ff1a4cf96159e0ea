"""A model without weights: names of its parameters, their ties, and where each is stored.

Checkpoints do not always store parameters under the names of the model: transformers 5 renames when
it loads, and fuses some. The names come from transformers itself, which is asked how it would load
each stored tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class InMemory:
    """What a stored tensor becomes when it is loaded.

    Attributes:
        name: Name of the parameter.
        is_part: Whether it is only a part of the parameter, or the parameter made from it in
            another way.
    """

    name: str
    is_part: bool


def _is_model(found: Any, root: type) -> bool:
    return isinstance(found, type) and issubclass(found, root)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A transformers model on the meta device.

    Attributes:
        model: Has shapes and names, but no values.
    """

    model: nn.Module

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Skeleton | None:
        """The model that a ``config.json`` describes.

        None if this version of transformers does not know it.
        """
        import torch
        import transformers

        name = (config.get("architectures") or [""])[0]
        if config.get("model_type") not in transformers.CONFIG_MAPPING:
            return None
        try:
            architecture: Any = getattr(transformers, name, None)
            if not _is_model(architecture, transformers.PreTrainedModel):
                return None
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            with torch.device("meta"):
                return cls(architecture(settings))
        except Exception:  # a package or version that lacks, or whatever odd settings lead to
            return None

    def names_in_memory(self, stored: Iterable[str]) -> dict[str, InMemory]:
        """Stored name -> the parameter that it becomes.

        Names of parameters stand for themselves.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        steps = get_model_conversion_mapping(self.model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        names: dict[str, InMemory] = {}
        for name in stored:
            renamed, part_of = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state:
                # Renamed without need, as the loader sees it; it may still lack the prefix.
                renamed, part_of = rename_source_key(name, [], [], prefix, state)
            names[name] = InMemory(renamed, part_of is not None)
        return names

    def tied_to(self, stored: str) -> list[str]:
        """Names of other parameters of the same memory."""
        name = self.names_in_memory([stored])[stored].name
        state = self.model.state_dict(keep_vars=True)
        return [
            other for other, tensor in state.items() if other != name and tensor is state.get(name)
        ]

    def is_transposed(self, stored: str) -> bool:
        """Whether the module of a matrix stores it as (in, out): the Conv1D of GPT-2."""
        from transformers.pytorch_utils import Conv1D

        module = self.names_in_memory([stored])[stored].name.rpartition(".")[0]
        return isinstance(self.model.get_submodule(module), Conv1D)
