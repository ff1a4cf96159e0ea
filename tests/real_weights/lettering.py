"""Lines of letters in four fonts, and how many of them a Tesseract model misreads."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.waiting import PATIENT

#: The letters that the models were trained on.
ALPHABET = "ABCDHKLMPRTVXY34"

_FONTS = "/usr/share/fonts"
#: Expert -> its font in Debian's `fonts-urw-base35`, `-dejavu-core`, `-liberation` and `-ocr-b`.
FONTS = {
    "courier": f"{_FONTS}/opentype/urw-base35/NimbusMonoPS-Regular.otf",
    "dejavu": f"{_FONTS}/truetype/dejavu/DejaVuSansMono.ttf",
    "libmono": f"{_FONTS}/truetype/liberation/LiberationMono-Regular.ttf",
    "ocrb": f"{_FONTS}/opentype/ocr-b/OCRB.otf",
}
OPTIONS = {
    "tessedit_char_whitelist": f"{ALPHABET}#",
    "load_system_dawg": "0",
    "load_freq_dawg": "0",
}


@dataclass(frozen=True)
class Page:
    """A picture of lines, and what they say."""

    file: Path
    lines: tuple[str, ...]


def render(
    file: Path,
    font: str,
    count: int,
    seed: int,
    *,
    size: int = 20,
    blur: float = 1.8,
    noise: float = 12,
) -> Page:
    """Random lines in a font, blurred and with noise, one below the other.

    Without blur every model reads every font without an error.
    """
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    rng = np.random.default_rng(seed)
    lines = tuple("".join(rng.choice([*ALPHABET], 32)) for _ in range(count))
    letters = ImageFont.truetype(font, size)
    picture = Image.new("L", (size * 24, (count + 1) * size * 2), 255)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((size, size * (2 * number + 1)), line, font=letters, fill=0)
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
    noisy = blurred + noise * rng.standard_normal(blurred.shape, dtype=np.float32)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, dpi=(150, 150))
    return Page(file, lines)


def error_rates(model: Path, page: Page) -> list[float]:
    """Character error rate of each line of a page, as a model reads it."""
    from nltk.metrics.distance import edit_distance

    read = _read(model, page.file)
    read += [""] * (len(page.lines) - len(read))
    return [
        edit_distance(line, found) / len(line)
        for line, found in zip(page.lines, read, strict=False)
    ]


def _read(model: Path, picture: Path) -> Sequence[str]:
    settings = [word for name, value in OPTIONS.items() for word in ("-c", f"{name}={value}")]
    command = ["tesseract", str(picture), "stdout", "--psm", "6", *settings]
    command += ["--tessdata-dir", str(model.parent), "-l", model.stem]
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENT, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.replace(" ", "") for line in done.stdout.splitlines() if line.strip()]
