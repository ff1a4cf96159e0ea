"""Questions of the questions zoo: items as files, and the processor that reads them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.zoo.clip_data import CLASSES, SIDE, Images, Labels

SPLITS = ("search", "validation", "test")
#: Task -> what is asked; the answers are the names of its classes.
QUESTIONS: Mapping[str, str] = {
    "digits": "which digit is it",
    "shapes": "which shape is it",
    "stripes": "which pattern is it",
    "counts": "how many dots are there",
}
PATCH = 4
#: What stands for a patch of the picture.
IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)

Items = Mapping[str, tuple[Images, Labels]]


def save_rows(folder: Path, items: Mapping[str, Items]) -> None:
    """A parquet file for each split: picture, question, answer, task, id."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for split in SPLITS:
        rows = [
            {
                "image": _png(image),
                "question": QUESTIONS[task],
                "answer": CLASSES[task][label],
                "domain": task,
                "id": f"{split}-{task}-{number}",
            }
            for task, (images, labels) in items[split].items()
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def _bytes(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Pictures with values in [-1, 1] as files store them."""
    return np.round((images + 1) * 127.5).astype(np.uint8)


def as_stored(items: Items) -> dict[str, tuple[Images, Labels]]:
    """The items as they are read back from files."""
    return {
        task: ((_bytes(images) / 127.5 - 1).astype(np.float32), labels)
        for task, (images, labels) in items.items()
    }


def _png(image: npt.NDArray[np.float32]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(_bytes(image).transpose(1, 2, 0)).save(stream, format="png")
    return stream.getvalue()


def _words() -> list[str]:
    asked = {word for question in QUESTIONS.values() for word in question.split()}
    answers = {name for names in CLASSES.values() for name in names}
    return ["<pad>", "<unk>", "</s>", IMAGE, *sorted(asked | answers)]


def make_processor() -> Any:
    """Pictures of the zoo's size, and a tokenizer of the zoo's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    numbers = {word: number for number, word in enumerate(_words())}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=32,
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def asked_tokens(processor: Any, task: str) -> list[int]:
    """Tokens of a picture and the question of a task."""
    patches = IMAGE * (SIDE // PATCH) ** 2
    numbers: list[int] = processor.tokenizer(f"{patches}{QUESTIONS[task]}")["input_ids"]
    return numbers


def answer_tokens(processor: Any, task: str) -> Any:
    """Token of each class of a task ``(classes,)``."""
    import torch

    return torch.tensor(processor.tokenizer.convert_tokens_to_ids(CLASSES[task]))
