"""A tokenizer of forty words for all models of the catalogue, and processors of pictures around it.

The special tokens have the numbers that the configurations of the catalogue give them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<start>",
    "end_image_token": "<end>",
    "mask_token": "<mask>",
    "unk_token": "<unk>",
}
WORDS = (
    *("a", "and", "answer", "big", "bird", "blue", "cat", "dog", "fast", "green", "in", "is", "it"),
    *("likes", "new", "of", "old", "one", "photo", "red", "sees", "small", "the", "they", "thing"),
    *("to", "two", "under", "what", "with", "yellow"),
)
#: Number of tokens.
SIZE = len(SPECIAL) + len(WORDS)
#: Side of pictures.
SIDE = 8
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_tokenizer(folder: Path, length: int = 12) -> Any:
    """Write the tokenizer, which ends every text, and return it.

    Args:
        folder: Where to.
        length: Tokens of a text at most.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate((*SPECIAL.values(), *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, numbers[end])]
    )
    common = {"pad_token", "bos_token", "eos_token", "mask_token", "unk_token"}
    others = {key: token for key, token in SPECIAL.items() if key not in common}
    # As Gemma and InternVL call them.
    others |= {"boi_token": "<start>", "eoi_token": "<end>", "context_image_token": "<image>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        extra_special_tokens=others,
        **{key: SPECIAL[key] for key in sorted(common)},
    )
    fast.save_pretrained(folder)
    return fast


def save_processor(folder: Path, name: str) -> Any:
    """Write the processor of an architecture of images and texts."""
    made = PROCESSORS[name](save_tokenizer(folder, 64))
    made.chat_template = TEMPLATE.replace("<image>", "<start>" if name == "gemma3" else "<image>")
    made.save_pretrained(folder)
    return made


def _llava(tokenizer: Any) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=_pictures("clip", "CLIPImageProcessorPil"),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen2_vl(tokenizer: Any) -> Any:
    from transformers import Qwen2VLProcessor

    pictures = _pictures(
        "qwen2_vl",
        "Qwen2VLImageProcessorPil",
        patch_size=4,
        size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
    )
    return Qwen2VLProcessor(image_processor=pictures, tokenizer=tokenizer)


def _internvl(tokenizer: Any) -> Any:
    from transformers import InternVLProcessor

    pictures = _pictures("got_ocr2", "GotOcr2ImageProcessorPil", crop_to_patches=False)
    return InternVLProcessor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=1)


def _gemma3(tokenizer: Any) -> Any:
    from transformers import Gemma3Processor

    pictures = _pictures("gemma3", "Gemma3ImageProcessorPil")
    return Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=4)


def _blip2(tokenizer: Any) -> Any:
    from transformers import Blip2Processor

    del tokenizer._special_tokens_map["image_token"]
    return Blip2Processor(_pictures("blip", "BlipImageProcessorPil"), tokenizer, num_query_tokens=2)


def _florence2(tokenizer: Any) -> Any:
    from transformers import Florence2Processor

    pictures = _pictures("clip", "CLIPImageProcessorPil")
    pictures.image_seq_length = 5
    return Florence2Processor(image_processor=pictures, tokenizer=tokenizer)


def _pictures(model: str, name: str, **options: Any) -> Any:
    """An image processor that needs Pillow alone."""
    from importlib import import_module

    module = import_module(f"transformers.models.{model}.image_processing_pil_{model}")
    square = {"height": SIDE, "width": SIDE}
    return getattr(module, name)(**({"size": square, "crop_size": square} | options))


#: Architecture -> what makes its processor.
PROCESSORS = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "blip2": _blip2,
    "florence2": _florence2,
}
