"""Tensor names of models that transformers does not build: a text file for each in ``names``.

A line is a name and a shape; ``{a,b}`` in a name stands for one name with each of the words. Biases
are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]

_FOLDER = Path(__file__).parent / "names"

#: File -> label of each tower and number of its blocks, as they should be found.
LAYOUTS: dict[str, dict[str, int]] = {
    "diffusers_unet": {"": 8},
    "diffusers_dit": {"": 2},
    "diffusers_flux": {"": 4},
    "diffusers_sd3": {"": 2},
    "diffusers_vae": {"": 4, "decoder": 6},
    "flux_original": {"": 5},
    "latent_diffusion_unet": {"": 7},
    "timm_vit": {"": 2},
    "timm_swin": {"": 3},
    "timm_convnext": {"": 5},
    "timm_resnet": {"": 8},
    "timm_efficientnet": {"": 5},
    "openvla": {"text": 2, "featurizer": 3, "fused_featurizer": 3},
    "prismatic": {"llm": 2, "dino_featurizer": 3, "siglip_featurizer": 3},
    "chatglm": {"": 2},
    "internvl_original": {"text": 2, "vision": 2},
    "whisper_openai": {"": 2, "decoder": 2},
}


@cache
def layout_shapes(name: str) -> Shapes:
    """Name -> shape of the tensors in a file."""
    shapes: Shapes = {}
    for line in (_FOLDER / f"{name}.txt").read_text().splitlines():
        pattern, *sizes = line.split()
        shapes |= {tensor: tuple(map(int, sizes)) for tensor in _expanded(pattern)}
    return shapes


def _expanded(pattern: str) -> Iterator[str]:
    words = [word.split(",") for word in re.split(r"[{}]", pattern)]
    return ("".join(parts) for parts in product(*words))
