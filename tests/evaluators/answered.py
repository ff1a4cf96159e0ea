"""A small LLaVA with its processor, and questions about pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import DOMAINS
from tests.evaluators.language import make_tokenizer
from tests.evaluators.pairs import seeded

SIDE = 8
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
IMAGE_TOKEN = 300


def question_folder(folder: Path, count: int = 24) -> Path:
    """``questions.parquet`` and ``processor`` in ``folder``."""
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    rng = np.random.default_rng(3)
    rows = []
    for index in range(count):
        stream = io.BytesIO()
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, format="png")
        rows.append(
            {
                "image": stream.getvalue(),
                "question": f"what {'colour' if index % 3 else 'thing'} is it",
                "answer": "red",
                # What a model without training says is a word, or it is not.
                "sign": "!",
                "people": ["red", "Red.", "a red", "blue"],
                "domain": DOMAINS[index % 2],
                "id": str(index),
            }
        )
    parquet.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
    make_processor(folder / "processor")
    return folder


def make_processor(folder: Path) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return processor


def pico_llava(seed: int = 0) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        image_size=SIDE, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=301, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
        bos_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return seeded(lambda: LlavaForConditionalGeneration(config), seed)
