"""Recordings: WAV files read by scipy, others by soundfile, as a feature extractor wants them.

Channels are averaged, samples are numbers of −1 to 1, and other sample rates are made the feature
extractor's by scipy's polyphase filter.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.data.media import Opened, media_array, media_bytes
from mergesearch.evaluators.data.pictures import processor_folder
from mergesearch.evaluators.data.pretrained import load_pretrained
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Samples = npt.NDArray[np.float32]

#: What WAV files begin with.
WAVE = (b"RIFF", b"RIFX", b"RF64")


def recording_array(values: Sequence[Any], folder: Path, where: str) -> pa.Array:
    """A struct of ``bytes``, ``path`` and ``size`` in seconds for every recording ``(items,)``.

    Args:
        values: As of :func:`~mergesearch.evaluators.data.media.media_array`.
        folder: Where relative paths start.
        where: Key of the study file and column, for messages.

    Raises:
        InputError: If a file is missing or is no recording, or needs soundfile and there is none.
    """

    def seconds(source: Opened) -> float:
        content = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        if not content.startswith(WAVE) and find_spec("soundfile") is None:
            name = "bytes of an item" if isinstance(source, io.BytesIO) else source
            raise InputError(
                f"{where}: {name}: expected a WAV file, or the library soundfile for other "
                "recordings, found none; install it: pip install 'mergesearch[audio]'"
            )
        rate, samples = read_samples(content)
        return len(samples) / rate

    return media_array(values, folder, where, "recording", seconds)


def read_samples(content: bytes) -> tuple[int, Samples]:
    """Sample rate in Hz, and samples ``(samples,)`` of −1 to 1, the mean of all channels.

    Raises:
        OSError, ValueError: If the content is no recording, or a part of one.
    """
    rate, samples = _wave(content) if content.startswith(WAVE) else _other(content)
    if not samples.size or not np.isfinite(samples).all():
        raise ValueError("expected samples, received none or infinite ones")
    mono = samples.mean(axis=1, dtype=np.float32) if samples.ndim > 1 else samples
    return rate, np.ascontiguousarray(mono, dtype=np.float32)


def resampled(samples: Samples, rate: int, wanted: int) -> Samples:
    """Samples ``(samples,)`` at another rate in Hz."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    made = resample_poly(samples, wanted // common, rate // common)
    return np.asarray(made, dtype=np.float32)


def check_recordings(longest: float, role: str, checkpoint: str | None, where: str) -> None:
    """Refuse recordings that a checkpoint's feature extractor does not make a model's inputs of.

    Args:
        longest: Seconds of the longest of them.
        role: Argument of the model.
        checkpoint: The checkpoint, or None.
        where: Key of the study file, for messages.

    Raises:
        InputError: In one line.
    """
    extractor = load_extractor(checkpoint, where)
    made = str((getattr(extractor, "model_input_names", None) or [""])[0])
    if made != role or not getattr(extractor, "sampling_rate", None):
        raise InputError(
            f"{where}: expected {made or 'other inputs'} from recordings, as the feature extractor "
            f"of {checkpoint} makes them, received {role}; name the column as inputs: "
            f"{{{made or 'NAME'}: COLUMN}}, or another checkpoint in data.processor"
        )
    most = getattr(extractor, "n_samples", None)
    # What extractors such as Whisper's would cut off without a word.
    if most is not None and longest > most / extractor.sampling_rate:
        raise InputError(
            f"{where}: expected recordings of at most {most / extractor.sampling_rate:g} s, as "
            f"the feature extractor of {checkpoint} reads no more, received one of {longest:.1f} "
            "s; cut it"
        )


def features(
    recordings: Sequence[Mapping[str, Any]], role: str, checkpoint: str | None, where: str
) -> list[Samples]:
    """What a model reads of each recording ``(samples,)`` or ``(frames, ...)``.

    Args:
        recordings: Rows of :func:`recording_array`.
        role: Argument of the model.
        checkpoint: Whose feature extractor makes them.
        where: Key of the study file, for messages.
    """
    extractor = load_extractor(checkpoint, where)
    wanted = int(extractor.sampling_rate)
    made = []
    for recording in recordings:
        rate, samples = read_samples(media_bytes(recording))
        inputs = extractor(
            resampled(samples, rate, wanted), sampling_rate=wanted, return_tensors="np"
        )
        made.append(np.asarray(inputs[role][0], dtype=np.float32))
    return made


@cache
def load_extractor(checkpoint: str | None, where: str) -> Any:
    """Load the feature extractor of a checkpoint.

    Raises:
        InputError: If there is none.
    """
    from transformers import AutoFeatureExtractor

    folder = processor_folder(checkpoint, where, "recordings")
    return load_pretrained(
        AutoFeatureExtractor, folder, "a feature extractor", f"{where}: {folder}"
    )


def _wave(content: bytes) -> tuple[int, npt.NDArray[Any]]:
    """Sample rate, and samples ``(samples,)`` or ``(samples, channels)`` of −1 to 1."""
    from scipy.io import wavfile

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            rate, samples = wavfile.read(io.BytesIO(content))
        except Exception as error:  # scipy reads headers without checking them
            raise ValueError(str(error)) from None
    # Of the things that scipy warns of, the others are chunks without samples.
    if any("prematurely" in str(one.message) for one in told):
        raise ValueError("expected a whole WAV file, received a part of one")
    if samples.dtype == np.uint8:
        return int(rate), (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return int(rate), (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return int(rate), samples


def _other(content: bytes) -> tuple[int, npt.NDArray[Any]]:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return int(rate), samples
