"""How a model answers the items of tasks: by logits of its own, or by what a head makes of it.

Whatever runs a model to see its answers (operators with calibration items, merges that depend on
their input, evaluators) asks a :class:`TaskHead`. Dual encoders such as CLIP have one of class
prompts (:class:`mergesearch.merging.models.prompt_heads.PromptHeads`); other models need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: Tasks of items: that of each, one for all, or None where there is only one.
Tasks = Sequence[str] | str | None


@dataclass(frozen=True, eq=False)
class Logits:
    """The output of a head.

    Attributes:
        logits: ``(items, classes)``; where tasks have different numbers of classes, those that a
            task lacks are minus infinity.
    """

    logits: torch.Tensor


class TaskHead(Protocol):
    """Makes the answers of a model."""

    def answer(self, model: Any, inputs: Mapping[str, torch.Tensor], tasks: Tasks) -> Any:
        """The output for a batch; ``logits`` of a classifier's are ``(items, classes)``."""

    def features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a router sees of every item: float32 or wider ``(items, width)``."""


class OwnHead:
    """The head that a model has itself; tasks make no difference to it."""

    def answer(self, model: Any, inputs: Mapping[str, torch.Tensor], tasks: Tasks) -> Any:
        """The output of the model."""
        return model(**inputs)

    def features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean last hidden state, over tokens or over positions of an image."""
        if "input_ids" in inputs:
            return _text_features(model, inputs)
        output = model(**inputs, output_hidden_states=True)
        state: torch.Tensor = output.hidden_states[-1].float()
        if state.ndim == 4:
            return state.mean(dim=(2, 3))
        return state.mean(dim=1) if state.ndim == 3 else state


def _text_features(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean last hidden state over the tokens that the mask keeps ``(items, width)``."""
    body = getattr(model, "base_model", model)  # it makes no logits of a whole vocabulary
    state: torch.Tensor = body(**inputs, output_hidden_states=True).hidden_states[-1].float()
    mask = inputs.get("attention_mask")
    if mask is None:
        return state.mean(dim=1)
    kept = mask.to(state.device, state.dtype)[:, :, None]
    return (state * kept).sum(dim=1) / kept.sum(dim=1)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to fp32, or keep fp64."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
