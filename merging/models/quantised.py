"""Weights of a model rounded as a quantised copy of it has them, for as long as it is scored.

The numbers stay in the model's dtype, so that it runs as before: what is measured is what the
rounding costs in quality, not how fast kernels for few bits are. Activations are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

from mergesearch.merging.tensors.roles import classify

if TYPE_CHECKING:
    import torch
    from torch import nn

QuantisedKind = Literal["int8", "int4", "q4_k"]
#: The names of :data:`QuantisedKind`.
KINDS: tuple[QuantisedKind, ...] = get_args(QuantisedKind)
#: Inputs that share a scale in ``int4``.
GROUP = 128


@contextmanager
def quantised_weights(models: Iterable[nn.Module], kind: QuantisedKind) -> Iterator[None]:
    """Round the matrices of models within the context; afterwards they are as they were.

    These are the weights of linear layers and convolutions and those of fused experts, but not of
    output heads over a vocabulary, and none that is shared with an embedding. A copy of the
    weights is held meanwhile.

    Args:
        models: May share weights.
        kind: As :func:`rounded`.
    """
    import torch

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for weight, turned in _matrices(models):
                kept.append((weight, weight.detach().clone()))
                rows = weight.T if turned else weight
                new = rounded(rows.reshape(_rows(rows), -1), kind).reshape(rows.shape)
                weight.copy_(new.T if turned else new)
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def rounded(matrix: torch.Tensor, kind: QuantisedKind) -> torch.Tensor:
    """A matrix ``(outputs, inputs)`` as it is after quantisation, in fp32.

    - ``int8``: −127 to 127, to the nearest, one scale for each output.
    - ``int4``: −7 to 7, to the nearest, one scale for each output and 128 inputs.
    - ``q4_k``: as a GGUF file of that type has it
      (:func:`mergesearch.merging.models.q4_k.quantised`): rows that are no multiple of 256 as
      ``q8_0``, of 32 as fp16.
    """
    if kind == "q4_k":
        return _as_gguf(matrix)
    return (
        _symmetric(matrix, 127, matrix.shape[1]) if kind == "int8" else _symmetric(matrix, 7, GROUP)
    )


def _symmetric(matrix: torch.Tensor, greatest: int, group: int) -> torch.Tensor:
    """Rounded to multiples of a scale, which is ``max |w| / greatest`` of each group of a row."""
    from torch.nn.functional import pad

    count = matrix.shape[1]
    groups = pad(matrix.float(), (0, -count % max(group, 1))).reshape(
        len(matrix), -1, max(group, 1)
    )
    scale = groups.abs().amax(dim=-1, keepdim=True) / greatest
    safe = scale.where(scale > 0, 1.0)
    numbers = (groups / safe).round_().clamp_(-greatest, greatest)
    return (numbers * scale).reshape(len(matrix), -1)[:, :count]


def _as_gguf(matrix: torch.Tensor) -> torch.Tensor:
    import torch
    from gguf import GGMLQuantizationType, quants

    from mergesearch.merging.models.q4_k import BLOCK, quantised

    rows = matrix.float().cpu().numpy()
    if rows.shape[1] % BLOCK == 0:
        read = quants.dequantize(quantised(rows), GGMLQuantizationType.Q4_K)
    else:
        small = rows.shape[1] % 32 == 0
        kind = GGMLQuantizationType.Q8_0 if small else GGMLQuantizationType.F16
        read = quants.dequantize(quants.quantize(rows, kind), kind)
    return torch.from_numpy(read).to(matrix.device)


def _rows(weight: torch.Tensor) -> int:
    """Rows of a weight seen as a matrix: its first axis, or all but the last of fused experts."""
    fused = weight.ndim == 3
    return int(weight.shape[0] * weight.shape[1]) if fused else int(weight.shape[0])


def _matrices(models: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Weights that are rounded, each once, and whether they are stored as (inputs, outputs)."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for model in models:
        left_out = _left_out(model)
        for weight, turned in _candidates(model):
            memory = weight.data_ptr(), tuple(weight.shape)
            if weight.is_floating_point() and memory[0] not in left_out and memory not in seen:
                seen.add(memory)
                yield weight, turned


def _candidates(model: nn.Module) -> Iterator[tuple[torch.Tensor, bool]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | Conv1D):
            yield module.weight, isinstance(module, Conv1D)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and classify(name).module == "mlp":  # (experts, outputs, inputs)
            yield parameter, False


def _left_out(model: nn.Module) -> set[int]:
    """Memory of embeddings and of the output head over a vocabulary."""
    from torch import nn

    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = [module.weight for module in modules]
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(None if find is None else find(), "weight", None)
    if weight is not None:
        weights.append(weight)
    return {weight.data_ptr() for weight in weights}
