"""What is proposed for models that see and hear: masks, what is said, questions about pictures."""

from __future__ import annotations

from pathlib import Path

from mergesearch.merging.models.model_classes import loads_as
from mergesearch.search.init.commented import Key
from mergesearch.search.init.models import PROCESSORS, Models, folder_with
from mergesearch.search.init.proposed import (
    Proposal,
    audio_argument,
    expert_of,
    has_template,
    is_media,
    tokenizer_keys,
)
from mergesearch.search.init.roles import Finder
from mergesearch.search.init.tables import Column
from mergesearch.search.init.tasks import PROMPTABLE

#: Question as models without a chat template were often trained with (BLIP-2).
PROMPT = "Question: {} Answer:"
#: Tokens that a text may begin with, such as those of language and task.
START = 5
WRITERS = "AutoModelForSpeechSeq2Seq"


def masks(finder: Finder, models: Models) -> Proposal:
    """Pictures and masks, with boxes or points for models that are told what to cut out."""
    data = finder.data
    image = finder.need("image", ("image", "numbers"), "pictures", _prompts_in(finder))
    inputs = {"pixel_values": image.name} | _prompts(finder, models)
    mask = finder.need("mask", ("numbers",), "masks (class numbers)", [*inputs.values()])
    domain = finder.domain([e.name for e in models.experts], [*inputs.values(), mask.name])
    keys = (
        Key("inputs", inputs, "Argument of the models: its column."),
        Key("mask", mask.name),
        Key("background", 0, "The class that does not count; `null` counts all."),
    )
    told = len(inputs) > 1
    return Proposal(
        data=data,
        kind="segmentation",
        why="The models cut out what boxes or points tell." if told else "The models give masks.",
        keys=keys,
        metric="dice",
        metric_why="Overlap with the masks, in the mean of items and their classes.",
        expert=None if domain is not None else expert_of(data, models, None),
        domain=None if domain is None else domain.name,
        processed=is_media(data, image.name),
    )


def _prompts_in(finder: Finder) -> list[str]:
    """Columns that are masks, boxes or points by their names."""
    roles = ("mask", "boxes", "points", "point_labels")
    found = (finder.usual(role, ("numbers",)) for role in roles)
    return [column.name for column in found if column is not None]


def _prompts(finder: Finder, models: Models) -> dict[str, str]:
    """Arguments that tell a promptable model what is meant, in the pixels that it sees.

    Raises:
        InputError: If it is promptable, and nothing tells.
    """
    if loads_as(PROMPTABLE, models.experts[0].config) != models.class_name:
        return {}
    points = finder.usual("points", ("numbers",))
    labels = finder.usual("point_labels", ("numbers",))
    if points is None:
        boxes = finder.usual("boxes", ("numbers",))
        if boxes is None:
            raise finder.missing("boxes", "boxes (or points), which say what to cut out")
        return {"input_boxes": boxes.name}
    named = {"input_points": points.name}
    return named if labels is None else named | {"input_labels": labels.name}


def speech(finder: Finder, models: Models) -> Proposal:
    """Recordings and what is said in them."""
    data = finder.data
    audio = finder.need("audio", ("audio", "numbers"), "recordings")
    text = finder.text((audio.name,))
    writes = loads_as(WRITERS, models.experts[0].config) == models.class_name
    default = "input_features" if writes else "input_values"
    domain = finder.domain([e.name for e in models.experts], (audio.name, text.name))
    model_class = (Key("model_class", WRITERS, "The models write what they hear."),)
    keys = (
        Key("inputs", {audio_argument(models, audio, default): audio.name}),
        Key("text", text.name),
        *(model_class if writes else ()),
        *_fewer_tokens(models),
        *tokenizer_keys(models),
    )
    return Proposal(
        data=data,
        kind="speech_recognition",
        why="The models hear what is said.",
        keys=keys,
        metric="wer",
        metric_why="Errors for each word, in the mean of recordings; `cer` counts letters.",
        domain=None if domain is None else domain.name,
        processed=is_media(data, audio.name),
    )


def _fewer_tokens(models: Models) -> tuple[Key, ...]:
    """Tokens that are written at most, where the models have fewer positions than by default."""
    positions = models.experts[0].config.get("max_target_positions")
    if not isinstance(positions, int) or positions > 128 + START:
        return ()
    count = max(positions - START, 1)
    return (Key("max_new_tokens", count, f"The models have {positions} positions."),)


def questions(finder: Finder, models: Models) -> Proposal:
    """Pictures, questions about them, and answers."""
    data = finder.data
    image = finder.need("image", ("image",), "pictures")
    question = finder.need("question", ("text",), "questions", (image.name,))
    taken: tuple[str, ...] = (image.name, question.name)
    several = finder.usual("answers", ("texts",))
    if several is None:
        answer = finder.need("answer", ("text",), "answers", taken)
        answered = (Key("answer", answer.name), *_length(answer))
    else:
        answered = (Key("answers", several.name, "Answers of several people."),)
        taken = (*taken, several.name)
    domain = finder.domain([e.name for e in models.experts], (*taken, answered[0].value))
    return Proposal(
        data=data,
        kind="visual_questions",
        why="The models look at a picture and write an answer.",
        keys=(
            Key("image", image.name),
            Key("question", question.name),
            *answered,
            *_asking(models),
        ),
        metric="accuracy",
        metric_why="Share of answers that are right, without case, articles and punctuation.",
        domain=None if domain is None else domain.name,
    )


def _length(answer: Column) -> tuple[Key, ...]:
    why = f"The longest answer of the first has {answer.longest} words."
    return (Key("max_new_tokens", 4 * answer.longest + 8, why),)


def _asking(models: Models) -> tuple[Key, ...]:
    """The processor, where the base has none, and the prompt, where there is no template."""
    path = folder_with(models, PROCESSORS)
    processor = () if path is None else (Key("tokenizer", path, "The base has no processor."),)
    if has_template(Path(path or models.base.folder or "")):
        return processor
    why = "The processor has no chat template: write the question as the models were trained."
    return (*processor, Key("prompt", PROMPT, why))
