"""Whether two folders hold the same function: both are run on the same drawn inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from mergesearch.merging.models.loading import load_model
from mergesearch.merging.models.model_classes import auto_classes

#: Items and tokens of drawn inputs.
ITEMS = 2
TOKENS = 16
#: Names of token inputs, and of what vision and audio read.
_TOKENS = ("input_ids", "decoder_input_ids")


def greatest_difference(
    first: str, second: str, config: Mapping[str, Any], seed: int = 0
) -> float | None:
    """The greatest difference of two models' answers over the greatest answer.

    None if the inputs of the model are of a kind that is not drawn here. Both are run in fp32, one
    after the other.

    Args:
        first: Folder of one model.
        second: Of the other, of the same architecture.
        config: Content of their ``config.json``.
        seed: Of the inputs.

    Raises:
        CheckpointError: If a model cannot be loaded.
    """
    name = auto_classes(config)[0]
    ours = _answers(load_model(first, name, "float32"), seed)
    if not ours:
        return None
    theirs = _answers(load_model(second, name, "float32"), seed)
    return max(
        float((one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny))
        for one, other in zip(ours, theirs, strict=True)
    )


def _answers(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """Floating tensors that a model answers with; none where its inputs cannot be drawn."""
    inputs = dict(_inputs(model, torch.Generator().manual_seed(seed)))
    if not inputs:
        return []
    with torch.no_grad():
        answer = model(**inputs)
    return [
        value
        for value in answer.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


def _inputs(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Any]]:
    """Drawn inputs by name: tokens, images, or both."""
    accepted = signature(model.forward).parameters
    config: Any = model.config
    vocabulary: Any = getattr(config.get_text_config(), "vocab_size", None)
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", None)
    encodes = "input_ids" in accepted and vocabulary is not None
    sees = "pixel_values" in accepted and isinstance(size, int)
    if encodes:
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or TOKENS
        shape = (ITEMS, min(TOKENS, longest))
        ids = torch.randint(vocabulary, shape, generator=generator)
        yield from ((name, ids) for name in _TOKENS if name in accepted)
        if "attention_mask" in accepted:
            yield "attention_mask", torch.ones_like(ids)
        if "use_cache" in accepted:
            yield "use_cache", False
    if sees and (not encodes or hasattr(config, "vision_config")):
        channels = getattr(vision, "num_channels", 3)
        yield "pixel_values", torch.randn(ITEMS, channels, size, size, generator=generator)
