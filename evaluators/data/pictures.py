"""Pictures: bytes or files, opened by Pillow and made pixels by a model's own image processor."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.data.media import Opened, media_array, media_bytes
from mergesearch.evaluators.data.pretrained import checkpoint_folder, load_pretrained
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa

#: Pictures that a processor gets at once.
AT_ONCE = 64


def picture_array(values: Sequence[Any], folder: Path, where: str) -> pa.Array:
    """A struct of ``bytes`` and ``path`` for every picture ``(items,)``, one of which is null.

    Args:
        values: As of :func:`~mergesearch.evaluators.data.media.media_array`.
        folder: Where relative paths start.
        where: Key of the study file and column, for messages.

    Raises:
        InputError: If a file is missing, or is no picture.
    """

    def pixels(source: Opened) -> float:
        with _open(source) as picture:
            return float(picture.width * picture.height)

    return media_array(values, folder, where, "picture", pixels)


def opened_picture(picture: Mapping[str, Any]) -> Any:
    """A row of :func:`picture_array` as an image in three colours."""
    return _open(io.BytesIO(media_bytes(picture))).convert("RGB")


def pixel_values(
    pictures: Sequence[Mapping[str, Any]], checkpoint: str | None, where: str
) -> npt.NDArray[np.float32]:
    """Pixels ``(items, channels, height, width)`` as a checkpoint's image processor makes them.

    Raises:
        InputError: If there is no processor, or it makes other pixels than the model reads.
    """
    processor = load_processor(checkpoint, where)
    # Of a model of grey pictures the processor normalises one channel.
    grey = len(getattr(processor, "image_mean", None) or ()) == 1
    parts = []
    for start in range(0, len(pictures), AT_ONCE):
        opened = [opened_picture(one) for one in pictures[start : start + AT_ONCE]]
        images = [np.asarray(one.convert("L"))[..., None] for one in opened] if grey else opened
        try:
            parts.append(processor(images=images, return_tensors="np", **_layout(grey)))
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"{where}: expected pictures that the image processor of {checkpoint} takes, "
                f"received {type(error).__name__}: {text}; name another in data.processor"
            ) from None
    return np.concatenate([part["pixel_values"] for part in parts]).astype(np.float32)


def _layout(grey: bool) -> dict[str, str]:
    return {"input_data_format": "channels_last"} if grey else {}


@cache
def load_processor(checkpoint: str | None, where: str) -> Any:
    """Load the image processor of a checkpoint.

    Raises:
        InputError: If there is none.
    """
    from transformers import AutoImageProcessor

    folder = processor_folder(checkpoint, where)
    return load_pretrained(AutoImageProcessor, folder, "an image processor", f"{where}: {folder}")


def processor_folder(checkpoint: str | None, where: str, what: str = "pictures") -> Path:
    """The folder of the processor of a checkpoint, which is only looked for.

    Raises:
        InputError: If it has none.
    """
    folder = None if checkpoint is None else checkpoint_folder(checkpoint, where)
    names = ("preprocessor_config.json", "processor_config.json")
    if folder is None or not any((folder / name).is_file() for name in names):
        raise InputError(
            f"{where}: expected a preprocessor_config.json for {what}, found none in "
            f"{checkpoint}; name a checkpoint that has one in data.processor"
        )
    return folder


def _open(source: Opened) -> Any:
    """Open a file or bytes as a picture, of which only the header is read."""
    from PIL import Image

    return Image.open(source)
