"""The evaluator of each architecture's kind, with items that are made for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.architectures.arrays import arrays, inputs_of
from tests.architectures.catalogue import ARCHITECTURES, Architecture
from tests.architectures.denoisers import DENOISERS, INSTALLED, wrongness
from tests.architectures.plain import closeness
from tests.architectures.vocabulary import (
    PROCESSORS,
    SIDE,
    WORDS,
    save_processor,
    save_tokenizer,
)

#: Items of each split.
COUNTS = {"search": 6, "validation": 4, "test": 4}
#: Experts, which are the domains too: items take turns.
EXPERTS = ("left", "right")
#: Classes that models have where their configuration does not say.
CLASSES = 2

Draw = np.random.Generator
Columns = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A section of a study, and the columns that it reads.

    Attributes:
        section: The keys beside ``data`` and ``domain``.
        columns: Makes columns of so many items; None where the evaluator has no items.
    """

    section: Mapping[str, Any]
    columns: Callable[[Draw, int], Columns] | None = None


_BY_AUTO: Mapping[str, tuple[str, ...]] = {
    "AutoModelForCausalLM": ("perplexity", "generation"),
    "AutoModelForMaskedLM": ("alignment",),
    "AutoModelForSequenceClassification": ("text_classification",),
    "AutoModelForTokenClassification": ("token_classification",),
    "AutoModelForSeq2SeqLM": ("sequence_to_sequence",),
    "AutoModelForSpeechSeq2Seq": ("speech_recognition",),
    "AutoModelForCTC": ("speech_recognition",),
    "AutoModelForAudioClassification": ("audio_classification",),
    "AutoModelForImageClassification": ("classification",),
    "AutoModelForSemanticSegmentation": ("segmentation",),
    "AutoModelForMaskGeneration": ("segmentation",),
    "AutoModelForObjectDetection": ("alignment",),
    "AutoModelForZeroShotImageClassification": ("zero_shot",),
    "AutoModelForImageTextToText": ("visual_questions",),
}
_BY_NAME: Mapping[str, tuple[str, ...]] = {
    "albert": ("similarity",),
    "mpnet": ("retrieval",),
    "qwen2_reward": ("reward",),
    # Their processors read videos too, for which transformers needs torchvision.
    "qwen2_vl": ("alignment",),
    "internvl": ("alignment",),
}


def kinds_of(name: str) -> tuple[str, ...]:
    """The evaluators of an architecture's kind."""
    if name not in ARCHITECTURES:
        return ("python",)
    return _BY_NAME.get(name) or _BY_AUTO.get(ARCHITECTURES[name].auto, ("distance",))


def sections_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """The ``evaluators:`` of a study, whose items are written to ``folder``.

    What texts and pictures need is written beside the base in ``folder``.
    """
    if name in DENOISERS and INSTALLED:
        function = f"{wrongness.__module__}:{wrongness.__name__}"
        objective = {"name": "error", "direction": "minimize"}
        return [{"kind": "python", "function": function, "objectives": [objective]}]
    if name not in ARCHITECTURES:
        module = closeness.__module__
        function = f"{module}:{closeness.__name__}"
        return [{"kind": "python", "function": function, "model_class": f"{module}:{name}"}]
    if name in PROCESSORS and "visual_questions" in kinds_of(name):
        save_processor(folder / "base", name)
    else:
        save_tokenizer(folder / "base")
    return [
        _section(kind, MADE[kind](ARCHITECTURES[name]), folder / f"items-{kind}")
        for kind in kinds_of(name)
    ]


def _section(kind: str, evaluation: Evaluation, items: Path) -> dict[str, Any]:
    """A section, once its items are written."""
    section = {"kind": kind, **evaluation.section}
    if evaluation.columns is None:
        return section
    import pyarrow as pa
    from pyarrow import parquet

    items.mkdir()
    for seed, (split, count) in enumerate(COUNTS.items()):
        columns = evaluation.columns(np.random.default_rng(seed), count)
        columns |= {
            "domain": [EXPERTS[index % 2] for index in range(count)],
            "id": [f"{split}-{index}" for index in range(count)],
        }
        parquet.write_table(pa.table(columns), items / f"{split}.parquet")
    return section | {"data": str(items), "domain": "domain", "id": "id"}


def _texts(rng: Draw, count: int, words: int = 5) -> list[str]:
    """Texts of so many words at most."""
    return [
        " ".join(WORDS[n] for n in rng.integers(len(WORDS), size=rng.integers(2, words + 1)))
        for _ in range(count)
    ]


def _numbers(rng: Draw, count: int, classes: int = CLASSES) -> list[int]:
    numbers: list[int] = rng.integers(classes, size=count).tolist()
    return numbers


def _scores(*metrics: str) -> dict[str, Any]:
    return {"objectives": [{"metric": metric} for metric in metrics]}


def _perplexity(_: Architecture) -> Evaluation:
    section = _scores("log_perplexity") | {"max_length": 8}
    return Evaluation(section, lambda rng, count: {"text": _texts(rng, count, 12)})


def _generation(_: Architecture) -> Evaluation:
    section = {"target": "target", "scorer": "contains", "max_new_tokens": 3}
    return Evaluation(
        section, lambda rng, count: {"prompt": _texts(rng, count), "target": _texts(rng, count, 2)}
    )


def _alignment(architecture: Architecture) -> Evaluation:
    inputs = inputs_of(architecture)
    section = {"model_class": architecture.auto, "inputs": {name: name for name in inputs}}
    return Evaluation(section, lambda rng, count: arrays(inputs, count, rng))


def _text_classification(_: Architecture) -> Evaluation:
    return Evaluation(
        _scores("accuracy", "cross_entropy"),
        lambda rng, count: {"text": _texts(rng, count), "label": _numbers(rng, count)},
    )


def _token_classification(_: Architecture) -> Evaluation:
    def columns(rng: Draw, count: int) -> Columns:
        words = [text.split() for text in _texts(rng, count)]
        return {"tokens": words, "tags": [_numbers(rng, len(row)) for row in words]}

    return Evaluation(_scores("f1", "cross_entropy"), columns)


def _similarity(_: Architecture) -> Evaluation:
    def columns(rng: Draw, count: int) -> Columns:
        pair = {"text": _texts(rng, count), "pair": _texts(rng, count)}
        return pair | {"score": rng.uniform(size=count).tolist()}

    return Evaluation(_scores("squared_error"), columns)


def _retrieval(_: Architecture) -> Evaluation:
    return Evaluation(
        _scores("ndcg", "cross_entropy"),
        lambda rng, count: {"query": _texts(rng, count), "document": _texts(rng, count)},
    )


def _reward(_: Architecture) -> Evaluation:
    return Evaluation(
        _scores("accuracy", "cross_entropy"),
        lambda rng, count: {"chosen": _texts(rng, count), "rejected": _texts(rng, count)},
    )


def _sequence_to_sequence(_: Architecture) -> Evaluation:
    return Evaluation(
        _scores("chrf", "cross_entropy") | {"max_new_tokens": 4},
        lambda rng, count: {"text": _texts(rng, count), "target": _texts(rng, count)},
    )


def _speech_recognition(architecture: Architecture) -> Evaluation:
    inputs = _read_by_encoder(architecture)
    section = _scores("wer", "cross_entropy") | {
        "model_class": architecture.auto,
        "inputs": {name: name for name in inputs},
        "max_new_tokens": 4,
    }
    return Evaluation(
        section, lambda rng, count: {**arrays(inputs, count, rng), "text": _texts(rng, count)}
    )


def _audio_classification(architecture: Architecture) -> Evaluation:
    inputs = inputs_of(architecture)
    classes = int(architecture.options["num_labels"])
    section = _scores("accuracy", "cross_entropy") | {"inputs": {name: name for name in inputs}}
    return Evaluation(
        section,
        lambda rng, count: {
            **arrays(inputs, count, rng),
            "label": _numbers(rng, count, classes),
        },
    )


def _classification(architecture: Architecture) -> Evaluation:
    inputs = inputs_of(architecture)
    section = _scores("accuracy", "cross_entropy") | {"input": "pixel_values"}
    return Evaluation(
        section,
        lambda rng, count: {**arrays(inputs, count, rng), "label": _numbers(rng, count)},
    )


def _segmentation(architecture: Architecture) -> Evaluation:
    inputs = inputs_of(architecture)
    side = inputs["pixel_values"][1][-1]
    section = _scores("dice", "cross_entropy") | {
        "model_class": architecture.auto,
        "inputs": {name: name for name in inputs},
    }

    def columns(rng: Draw, count: int) -> Columns:
        masks = rng.integers(CLASSES, size=(count, side, side)).tolist()
        return {**arrays(inputs, count, rng), "mask": masks}

    return Evaluation(section, columns)


def _zero_shot(architecture: Architecture) -> Evaluation:
    # CLIP reads a text at its highest token, so that the class has to have it.
    names = ["bird", "cat", "dog"]
    side = architecture.options["vision_config"]["image_size"]
    inputs = {"image": ("numbers", (3, side, side))}
    section = _scores("accuracy", "cross_entropy") | {"prompts": ["a {}"]}

    def columns(rng: Draw, count: int) -> Columns:
        labels = [names[number] for number in _numbers(rng, count, len(names))]
        return {**arrays(inputs, count, rng), "label": labels}

    return Evaluation(section, columns)


def _visual_questions(architecture: Architecture) -> Evaluation:
    spoken = architecture.model not in UNSPOKEN
    section = _scores("accuracy", *(["cross_entropy"] if spoken else [])) | {
        "answer": "answer",
        "max_new_tokens": 3,
        **({} if spoken else {"prompt": "{} answer"}),
    }

    def columns(rng: Draw, count: int) -> Columns:
        pictures = [_picture(rng) for _ in range(count)]
        questions = [f"what is {text}" for text in _texts(rng, count, 2)]
        return {"image": pictures, "question": questions, "answer": _texts(rng, count, 2)}

    return Evaluation(section, columns)


def _distance(architecture: Architecture) -> Evaluation:
    return Evaluation({"model_class": architecture.auto})


def _picture(rng: Draw) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="png")
    return stream.getvalue()


def _read_by_encoder(architecture: Architecture) -> dict[str, Any]:
    """The arguments of a model that writes, without what it has written."""
    inputs = inputs_of(architecture)
    return {name: one for name, one in inputs.items() if not name.startswith("decoder")}


#: Models whose processors have no chat template.
UNSPOKEN = ("Blip2ForConditionalGeneration", "Florence2ForConditionalGeneration")

#: Kind -> what makes its section for an architecture.
MADE: Mapping[str, Callable[[Architecture], Evaluation]] = {
    "alignment": _alignment,
    "audio_classification": _audio_classification,
    "classification": _classification,
    "distance": _distance,
    "generation": _generation,
    "perplexity": _perplexity,
    "retrieval": _retrieval,
    "reward": _reward,
    "segmentation": _segmentation,
    "sequence_to_sequence": _sequence_to_sequence,
    "similarity": _similarity,
    "speech_recognition": _speech_recognition,
    "text_classification": _text_classification,
    "token_classification": _token_classification,
    "visual_questions": _visual_questions,
    "zero_shot": _zero_shot,
}
