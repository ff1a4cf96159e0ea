"""Sections of evaluators of audio: classes of recordings, and what is said in them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field as Key

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ItemSpec, ScoreSpec


class _AudioSpec(ItemSpec):
    """Recordings: files, or arrays of numbers as the model reads them."""

    inputs: dict[str, str] = Key(
        default_factory=lambda: {"input_values": "audio"},
        min_length=1,
        description="Argument of the model -> column of arrays, or of paths or bytes of files.",
    )
    batch_size: int = Key(default=16, ge=1, description="Items of a forward pass.")


class AudioMetricSpec(ScoreSpec):
    """One objective of an audio classification evaluator."""

    metric: Literal["accuracy", "f1", "cross_entropy"] = "accuracy"


class AudioBoundSpec(BoundSpec, AudioMetricSpec):
    """One bound of an audio classification evaluator."""


class AudioClassificationSpec(_AudioSpec):
    """Classes that a model gives to recordings."""

    kind: Literal["audio_classification"]
    label: str = Key(default="label", description="Column of the class numbers, or their names.")
    objectives: list[AudioMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [AudioMetricSpec()]
    )
    constraints: list[AudioBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.audio.classification import AudioClassification

        options = self._options(folder, where, None, self.inputs)
        options["columns"] |= {"label": self.label}
        return AudioClassification(**options)


class RecognitionMetricSpec(ScoreSpec):
    """One objective of a speech recognition evaluator."""

    metric: Literal["wer", "cer", "exact_match", "cross_entropy"] = Key(
        default="wer",
        description="wer and cer: errors for each word or character, in the mean of items; "
        "cross_entropy of the text, for each of its tokens.",
    )


class RecognitionBoundSpec(BoundSpec, RecognitionMetricSpec):
    """One bound of a speech recognition evaluator."""


class SpeechRecognitionSpec(_AudioSpec):
    """What a model hears in recordings."""

    kind: Literal["speech_recognition"]
    text: str = Key(default="text", description="Column of what is said.")
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    model_class: Literal["AutoModelForCTC", "AutoModelForSpeechSeq2Seq"] = Key(
        default="AutoModelForCTC", description="transformers auto class of the model."
    )
    max_new_tokens: int = Key(
        default=128, ge=1, description="Tokens that an encoder-decoder writes at most."
    )
    ignore_case: bool = Key(default=True, description="Take upper and lower case as the same.")
    objectives: list[RecognitionMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [RecognitionMetricSpec()]
    )
    constraints: list[RecognitionBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.audio.recognition import SpeechRecognition

        own = self.model_dump(include={"max_new_tokens", "ignore_case"})
        options = self._options(folder, where, None, {**self.inputs, "target": self.text})
        return SpeechRecognition(self.tokenizer, self.model_class, **own, **options)
