"""Tiny models of diffusers, and how wrong they are about noise.

Their structure is also known from their names alone, so that it is tested where diffusers is not
installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tests.architectures.arrays import arrays, inputs_of
from tests.architectures.catalogue import Architecture

INSTALLED = find_spec("diffusers") is not None

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_JOINT = _HEADS | {"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 8}


def _of_diffusers(model: str, **options: Any) -> Architecture:
    return Architecture(model, "", options, "AutoModel", library="diffusers")


#: Layout -> the model of diffusers that has it.
DENOISERS: dict[str, Architecture] = {
    "diffusers_unet": _of_diffusers(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[8, 16],
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    "diffusers_dit": _of_diffusers(
        "DiTTransformer2DModel",
        **_HEADS,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ),
    "diffusers_flux": _of_diffusers(
        "FluxTransformer2DModel",
        **_JOINT,
        patch_size=1,
        num_single_layers=2,
        axes_dims_rope=[2, 2, 4],
    ),
    "diffusers_sd3": _of_diffusers(
        "SD3Transformer2DModel",
        **_JOINT,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        caption_projection_dim=16,
        pos_embed_max_size=8,
    ),
    "diffusers_vae": _of_diffusers(
        "AutoencoderKL",
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        layers_per_block=1,
    ),
}


def wrongness(model: Any) -> float:
    """Mean squared error of a denoiser about noise, or of an autoencoder about pictures."""
    [architecture] = [one for one in DENOISERS.values() if one.model == type(model).__name__]
    items = arrays(inputs_of(architecture), 2, np.random.default_rng(0))
    arguments = {name: torch.tensor(values) for name, values in items.items()}
    with torch.inference_mode():
        answer = model(**arguments).sample
    return float(((answer - next(iter(arguments.values()))) ** 2).mean())
