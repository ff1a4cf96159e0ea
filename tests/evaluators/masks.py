"""Items with masks, and small segmentation models for them, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergesearch.evaluators import SPLITS
from tests.evaluators.items import DOMAINS, save

SIDE = 16
CLASSES = 3
COUNT = 10


def pico_sam(seed: int = 0) -> Any:
    """A SAM of one encoder block, for grey images of 16 x 16, that answers with masks of 8 x 8."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_channels": 1,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 0,
            "global_attn_indexes": [0],
            "mlp_dim": 16,
            "num_pos_feats": 8,
            "initializer_range": 0.5,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIDE,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SamModel(config).eval()


def pico_segformer(seed: int = 0) -> Any:
    """A Segformer that gives logits of a quarter of the image's side."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_channels=1,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SegformerForSemanticSegmentation(config).eval()


def columns(seed: int, count: int = COUNT) -> dict[str, Any]:
    """Random images, boxes and masks of three classes; the domains take turns."""
    generator = np.random.default_rng([seed, 7])
    corner = generator.integers(0, SIDE // 2, (count, 1, 2))
    return {
        "pixels": generator.standard_normal((count, SIDE, SIDE)).astype("float32"),
        "boxes": np.concatenate([corner, corner + 6], axis=2).astype("float32"),
        "points": (corner[:, :, None] + 3).astype("float32"),
        "mask": generator.integers(0, CLASSES, (count, SIDE, SIDE)).astype("uint8"),
        "domain": [DOMAINS[index % 2] for index in range(count)],
        "id": [f"{seed}-{index}" for index in range(count)],
    }


def splits() -> dict[str, dict[str, Any]]:
    """Search, validation and test items, disjoint."""
    return {name: columns(seed) for seed, name in enumerate(SPLITS)}


def stored(folder: Path, tables: dict[str, dict[str, Any]]) -> Path:
    """Write split -> columns as a ``datasets`` folder, arrays as nested lists."""
    plain = {
        split: {
            name: values.tolist() if isinstance(values, np.ndarray) else values
            for name, values in table.items()
        }
        for split, table in tables.items()
    }
    return save(folder, plain)


def plain_dice(answer: Any, mask: Any, classes: list[int]) -> float:
    """From the definition, class by class."""
    results = [
        2 * np.sum((answer == c) & (mask == c)) / (np.sum(answer == c) + np.sum(mask == c))
        for c in classes
        if np.any(answer == c) or np.any(mask == c)
    ]
    return float(np.mean(results)) if results else 1.0


def plain_iou(answer: Any, mask: Any, classes: list[int]) -> float:
    """From the definition, class by class."""
    results = [
        np.sum((answer == c) & (mask == c)) / np.sum((answer == c) | (mask == c))
        for c in classes
        if np.any(answer == c) or np.any(mask == c)
    ]
    return float(np.mean(results)) if results else 1.0
