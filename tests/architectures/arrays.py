"""Items that are plain arrays: what operators and evaluators that take no words run a model on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.architectures.catalogue import Architecture

#: Argument of the model -> kind and shape of one item.
Inputs = Mapping[str, tuple[str, tuple[int, ...]]]

_TOKENS = ("tokens", (8,))
_PIXELS = ("numbers", (3, 8, 8))
#: A prompt with the four tokens that stand for a picture at its beginning.
_PROMPT = ("prompt 4", (8,))
_LATENT = ("numbers", (4, 8, 8))
_TIME = ("time", ())
_CONDITION: Inputs = {
    "encoder_hidden_states": ("numbers", (3, 16)),
    "pooled_projections": ("numbers", (8,)),
}

_BY_AUTO: Mapping[str, Inputs] = {
    "AutoModelForCausalLM": {"input_ids": _TOKENS},
    "AutoModelForMaskedLM": {"input_ids": _TOKENS},
    "AutoModelForSequenceClassification": {"input_ids": _TOKENS},
    "AutoModelForTokenClassification": {"input_ids": _TOKENS},
    "AutoModelForSeq2SeqLM": {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
    "AutoModelForSpeechSeq2Seq": {
        "input_features": ("numbers", (8, 20)),
        "decoder_input_ids": _TOKENS,
    },
    "AutoModelForCTC": {"input_values": ("numbers", (64,))},
    "AutoModelForAudioClassification": {"input_values": ("numbers", (64,))},
    "AutoModelForSemanticSegmentation": {"pixel_values": ("numbers", (3, 32, 32))},
    "AutoModelForObjectDetection": {"pixel_values": ("numbers", (3, 32, 32))},
    "AutoModelForMaskGeneration": {
        "pixel_values": ("numbers", (3, 16, 16)),
        "input_boxes": ("boxes", (1, 4)),
    },
    "AutoModelForZeroShotImageClassification": {"input_ids": _TOKENS, "pixel_values": _PIXELS},
}
_BY_MODEL: Mapping[str, Inputs] = {
    "AlbertModel": {"input_ids": _TOKENS},
    "MPNetModel": {"input_ids": _TOKENS},
    "ASTForAudioClassification": {"input_values": ("numbers", (16, 8))},
    "ViTMAEForPreTraining": {"pixel_values": _PIXELS, "noise": ("numbers", (4,))},
    "ClapModel": {"input_ids": _TOKENS, "input_features": ("numbers", (1, 32, 8))},
    "LlavaForConditionalGeneration": {"input_ids": _PROMPT, "pixel_values": _PIXELS},
    "Qwen2VLForConditionalGeneration": {
        "input_ids": ("prompt 1", (8,)),
        "pixel_values": ("numbers", (4, 96)),
        "image_grid_thw": ("grid", (3,)),
        "mm_token_type_ids": ("first", (8,)),
    },
    "InternVLForConditionalGeneration": {
        "input_ids": ("prompt 1", (8,)),
        "pixel_values": _PIXELS,
    },
    "Gemma3ForConditionalGeneration": {"input_ids": _PROMPT, "pixel_values": _PIXELS},
    "Blip2ForConditionalGeneration": {
        "input_ids": ("prompt 2", (8,)),
        "pixel_values": _PIXELS,
        "decoder_input_ids": _TOKENS,
    },
    "Florence2ForConditionalGeneration": {
        "input_ids": ("prompt 5", (8,)),
        "pixel_values": _PIXELS,
        "decoder_input_ids": _TOKENS,
    },
    # of diffusers
    "UNet2DConditionModel": {
        "sample": _LATENT,
        "timestep": _TIME,
        "encoder_hidden_states": ("numbers", (3, 8)),
    },
    "DiTTransformer2DModel": {"hidden_states": _LATENT, "timestep": _TIME, "class_labels": _TIME},
    "FluxTransformer2DModel": {
        "hidden_states": ("numbers", (64, 4)),
        "timestep": _TIME,
        "img_ids": ("numbers", (64, 3)),
        "txt_ids": ("numbers", (3, 3)),
        **_CONDITION,
    },
    "SD3Transformer2DModel": {"hidden_states": _LATENT, "timestep": _TIME, **_CONDITION},
    "AutoencoderKL": {"sample": _PIXELS},
}


def inputs_of(architecture: Architecture) -> Inputs:
    """Arguments of the model; empty where there are no plain arrays for it."""
    if architecture.auto == "AutoModelForImageClassification":
        side = architecture.options.get("image_size", 32)
        return {"pixel_values": ("numbers", (3, side, side))}
    return _BY_MODEL.get(architecture.model) or _BY_AUTO.get(architecture.auto, {})


def arrays(inputs: Inputs, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Argument of the model -> nested lists ``(count, ...)``."""
    return {name: _drawn(kind, (count, *shape), rng) for name, (kind, shape) in inputs.items()}


def _drawn(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    word, _, number = kind.partition(" ")
    if word == "numbers":
        return rng.standard_normal(shape).astype("float32").tolist()
    if word == "boxes":
        return np.broadcast_to(np.array([2.0, 2.0, 9.0, 9.0], "float32"), shape).tolist()
    if word == "first":
        return np.broadcast_to(np.arange(shape[1]) == 0, shape).astype("int64").tolist()
    if word == "grid":
        return np.broadcast_to(np.array([1, 2, 2]), shape).tolist()
    if word == "time":
        return rng.integers(1, 9, shape).tolist()
    tokens = rng.integers(10, 40, shape)
    tokens[:, : int(number or 0)] = 3
    return tokens.tolist()
