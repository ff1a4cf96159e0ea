"""Recordings in real files, and feature extractors for them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000
NAMES = ("tone", "noise", "hum")

WAV2VEC = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
    "sampling_rate": RATE, "do_normalize": True, "padding_value": 0.0,
    "return_attention_mask": False,
}  # fmt: skip
WHISPER = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8,
    "sampling_rate": RATE, "hop_length": 160, "chunk_length": 1, "n_fft": 400,
}  # fmt: skip


def write_wave(
    path: Path, samples: np.ndarray[Any, Any], *, rate: int = RATE, width: int = 2
) -> Path:
    """Write samples ``(samples,)`` or ``(samples, channels)`` of −1 to 1 as whole numbers."""
    rows = samples[:, None] if samples.ndim == 1 else samples
    top = 2 ** (8 * width - 1)
    whole = np.clip(np.round(rows * top), -top, top - 1).astype("<i8")
    if width == 1:
        whole += top  # 8 bits have no sign
    content = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(rows.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def noise(index: int, count: int = 800) -> np.ndarray[Any, Any]:
    """Samples of −1 to 1 ``(count,)``, other ones for every index."""
    return np.random.default_rng([9, index]).uniform(-1, 1, count)


def extractor_folder(folder: Path, settings: dict[str, Any] = WAV2VEC) -> Path:
    """A checkpoint that is a feature extractor alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def class_folders(folder: Path, count: int = 6) -> Path:
    """Folders of recordings by class, of two lengths, in ``sounds``, and ``base``."""
    for number, name in enumerate(NAMES):
        (folder / "sounds" / name).mkdir(parents=True)
        for index in range(count):
            samples = noise(count * number + index, 700 + 100 * (index % 2))
            write_wave(folder / "sounds" / name / f"{index}.wav", samples)
    extractor_folder(folder / "base")
    return folder
