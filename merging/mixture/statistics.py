"""What a mixture does on calibration items: who is used, and who resembles whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.mixture.layers import MoeLayer
from mergesearch.merging.models.calibration_items import Items

if TYPE_CHECKING:
    import torch
    from torch import nn

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What the tokens of the calibration tell of one block.

    Attributes:
        usage: Share of all choices that fell on each expert, ``(experts,)``.
        logits: Inner products of the router's logits over all tokens, ``(experts, experts)``.
        outputs: Inner products of the experts' outputs over all tokens, ``(experts, experts)``;
            zeros where they were not asked for.
        tokens: Their number.
    """

    usage: Numbers
    logits: Numbers
    outputs: Numbers
    tokens: int


def cosines(products: Numbers) -> Numbers:
    """Cosines from inner products; those of a vector of zeros are zero."""
    norms = np.sqrt(np.diag(products))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    scaled: Numbers = products * inverse[:, None] * inverse[None, :]
    return scaled


def measure_layers(
    model: nn.Module, layers: Sequence[MoeLayer], batches: Sequence[Items], *, outputs: bool
) -> list[LayerStatistics]:
    """Run a model on items and count what its routers do.

    Args:
        model: As transformers loads it.
        layers: The blocks with experts.
        batches: Items; tokens that ``attention_mask`` leaves out do not count.
        outputs: Whether every expert is also run on every token, for their resemblance.

    Raises:
        CheckpointError: If a block of the model is laid out in another way than expected.
    """
    import torch

    counters = [
        _Counter(module, layer, outputs) for layer, module in mixture_modules(model, layers)
    ]
    like = next(model.parameters())
    with torch.no_grad(), ExitStack() as stack:
        for counter in counters:
            stack.callback(counter.gate.register_forward_hook(counter.see).remove)
        for items in batches:
            inputs = {name: tensor.to(like.device) for name, tensor in items.inputs.items()}
            for counter in counters:
                counter.mask = inputs.get("attention_mask")
            model(**inputs, use_cache=False)
    return [counter.statistics() for counter in counters]


def mixture_modules(
    model: nn.Module, layers: Sequence[MoeLayer]
) -> Iterator[tuple[MoeLayer, nn.Module]]:
    """The module of each block's mixture: the one in the block that has a router and experts.

    Raises:
        CheckpointError: If a block has none.
    """
    found: Mapping[str, nn.Module] = {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if hasattr(module, "gate") and hasattr(module, "experts")
    }
    for layer in layers:
        if layer.block not in found:
            raise CheckpointError(
                f"{layer.block}: expected a router and experts in {type(model).__name__}, found "
                "none; give the class that the checkpoint was trained with"
            )
        yield layer, found[layer.block]


class _Counter:
    """Counts what one router does."""

    def __init__(self, module: Any, layer: MoeLayer, outputs: bool) -> None:
        self.gate = module.gate
        self.mask: torch.Tensor | None = None
        self._experts = module.experts
        self._block = layer.block
        self._outputs = outputs
        self._chosen = np.zeros(layer.experts)
        self._logit_products = np.zeros((layer.experts, layer.experts))
        self._output_products = np.zeros((layer.experts, layer.experts))
        self._tokens = 0

    def see(self, _gate: nn.Module, inputs: tuple[Any, ...], answer: Any) -> None:
        """Count the tokens of one forward pass; a forward hook of the router."""
        import torch

        if not isinstance(answer, tuple) or len(answer) != 3:
            raise CheckpointError(
                f"{self._block}: expected a router that gives logits, weights and choices, "
                "received another; use the transformers version that constraints.txt names"
            )
        logits, _, chosen = answer
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        kept = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        if self.mask is not None:
            kept = self.mask.reshape(-1).bool()
        seen = logits[kept].double()
        self._logit_products += (seen.T @ seen).cpu().numpy()
        counted = torch.bincount(chosen[kept].reshape(-1), minlength=len(self._chosen))
        self._chosen += counted.cpu().numpy()
        self._tokens += len(seen)
        if self._outputs:
            self._see_outputs(hidden[kept])

    def _see_outputs(self, hidden: torch.Tensor) -> None:
        """Run every expert on every token."""
        import torch

        weight = torch.ones((len(hidden), 1), dtype=hidden.dtype, device=hidden.device)
        rows = []
        for expert in range(len(self._chosen)):
            index = torch.full((len(hidden), 1), expert, device=hidden.device)
            rows.append(self._experts(hidden, index, weight).reshape(-1).double())
        stacked = torch.stack(rows)
        self._output_products += (stacked @ stacked.T).cpu().numpy()

    def statistics(self) -> LayerStatistics:
        """What was counted."""
        total = max(1.0, float(self._chosen.sum()))
        return LayerStatistics(
            self._chosen / total, self._logit_products, self._output_products, self._tokens
        )
