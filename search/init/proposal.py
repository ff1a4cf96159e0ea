"""What is proposed for one set of items: a kind of evaluator, its columns and its metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.family.head_names import label_count
from mergesearch.search.init.commented import Key
from mergesearch.search.init.embedding import embeddings, preferences
from mergesearch.search.init.models import Models
from mergesearch.search.init.perceiving import masks, questions, speech
from mergesearch.search.init.proposed import (
    Proposal,
    audio_argument,
    expert_of,
    has_template,
    is_media,
    tokenizer_keys,
)
from mergesearch.search.init.roles import Finder, shortened
from mergesearch.search.init.tables import Column, DataFile
from mergesearch.search.init.tasks import Task

#: Words of an answer up to which it is compared as a whole.
SHORT_ANSWER = 6
_EQUAL = "Share of answers that are equal to the expected ones."
#: Task -> kind of evaluator, where items have one class each.
KINDS = {
    "texts": "text_classification",
    "images": "classification",
    "audio": "audio_classification",
}


def propose(
    data: DataFile,
    task: Task,
    models: Models,
    columns: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
) -> Proposal:
    """An evaluator for items, by what the models do and the columns hold.

    Raises:
        InputError: If a column is missing, or its values are no classes.
    """
    if data.media and task.name in ("texts", "words", "language", "writing", "encoding"):
        raise InputError(
            f"--data {data.given}: expected texts, as the models are {task.shown}, received a "
            f"folder of {data.media} files; give a CSV, JSONL or Parquet file"
        )
    finder = Finder(data, {role: name for role, name in columns.items() if name in data.columns})
    given = classes.get(data.name, classes.get("", ()))
    if task.name in PROPOSED:
        return PROPOSED[task.name](finder, models)
    if task.name == "zero_shot":
        return _zero_shot(finder, models, tuple(given))
    if task.name == "words":
        return _words(finder, models, tuple(given))
    if task.name == "texts" and _regresses(models):
        return preferences(finder, models) or _numbers(finder, models)
    return _classes(finder, task, models, tuple(given))


def _language(finder: Finder, models: Models) -> Proposal:
    """Answers where there are prompts and short answers, perplexity of texts elsewhere."""
    data = finder.data
    prompt = finder.find("prompt", ("text",))
    target = None if prompt is None else finder.find("target", ("text",), (prompt.name,))
    tokenizer = tokenizer_keys(models)
    if prompt and target and target.longest <= SHORT_ANSWER and "text" not in finder.given:
        keys = (
            Key("prompt", prompt.name),
            Key("target", target.name),
            Key("max_new_tokens", 4 * target.longest + 8, _longest(target)),
            *tokenizer,
            *_chat(models),
        )
        why = f"Prompts ({prompt.name}) with short answers ({target.name})."
        return Proposal(data, "generation", why, keys, "score", _EQUAL)
    text = finder.text(())
    why = f"Texts without short answers: how well column {text.name} is predicted."
    keys = (Key("text", text.name), *tokenizer)
    reason = "The mean over texts of the logarithm, so that single texts do not decide."
    return Proposal(data, "perplexity", why, keys, "log_perplexity", reason)


def _longest(target: Column) -> str:
    return f"The longest answer of the first has {target.longest} words."


def _chat(models: Models) -> tuple[Key, ...]:
    folder = models.base.folder
    if folder is None or not has_template(Path(folder)):
        return ()
    return (Key("chat_template", True, "The tokenizer of the base has a template."),)


def _writing(finder: Finder, models: Models) -> Proposal:
    text = finder.text(())
    target = finder.need("target", ("text",), "what should be written", (text.name,))
    keys = (
        Key("text", text.name),
        Key("target", target.name),
        Key("max_new_tokens", 2 * target.longest + 8, _longest(target)),
        *tokenizer_keys(models),
    )
    why = "The models read a text and write another one."
    return Proposal(finder.data, "sequence_to_sequence", why, keys, "chrf", "Letters in common.")


def _zero_shot(finder: Finder, models: Models, given: tuple[str, ...]) -> Proposal:
    """Pictures and the names of their classes."""
    data = finder.data
    image = finder.need("image", ("image", "numbers"), "pictures")
    label = finder.need("label", ("text", "integer"), "names of classes", (image.name,))
    if label.kind == "integer" and not given and label.name not in data.named:
        raise InputError(
            f"--data {data.given}: column {label.name!r}: expected names of classes, which fill "
            f"the prompts, received numbers below {max(label.values, default=0) + 1}; list them "
            "with --classes A,B,..."
        )
    keys = (
        Key("image", image.name),
        Key("label", label.name),
        Key("prompts", ["a photo of a {}."], "Texts that stand for the classes; add your own."),
        *tokenizer_keys(models),
    )
    return Proposal(
        data=data,
        kind="zero_shot",
        why="The models compare pictures with texts: classes are asked for by their names.",
        keys=keys,
        metric="accuracy",
        metric_why="Share of items that are right.",
        classes=given,
        processed=is_media(data, image.name),
        given=bool(given),
    )


def _words(finder: Finder, models: Models, given: tuple[str, ...]) -> Proposal:
    """Classes of the words of texts."""
    data = finder.data
    words = finder.need("words", ("texts",), "lists of words")
    tags = finder.need("tags", ("texts", "numbers"), "lists of tags", (words.name,))
    keys = (Key("words", words.name), Key("tags", tags.name), *tokenizer_keys(models))
    why = "The models give a class to every word."
    expert = expert_of(data, models, None)
    return Proposal(
        data, "token_classification", why, keys, "f1", "Macro F1 over classes.", given, expert
    )


def _numbers(finder: Finder, models: Models) -> Proposal:
    """Numbers that models of one output give to texts."""
    inputs = _texts(finder, models)
    taken = [*inputs.values()]
    number = finder.need("number", ("number", "integer"), "numbers to predict", taken)
    keys = (*_as_keys(inputs), Key("number", number.name), *tokenizer_keys(models))
    why = "The models give one number to every text."
    reason = "Whether the numbers rank the texts right, on whatever scale."
    return Proposal(finder.data, "text_classification", why, keys, "spearman", reason)


def _classes(finder: Finder, task: Task, models: Models, given: tuple[str, ...]) -> Proposal:
    """Classes of texts, pictures or recordings."""
    data = finder.data
    inputs, taken = _inputs(finder, task, models)
    domain = finder.domain([e.name for e in models.experts], taken)
    others = [*taken, *([] if domain is None else [domain.name])]
    expert = None if domain is not None else expert_of(data, models, _known_labels(finder, others))
    names = given or tuple(models.labels(expert) or ())
    label = finder.label(names, len(names) or _count(models, expert), others)
    keys = (*_as_keys(inputs), Key("label", label.name, _label_why(label, names)))
    return Proposal(
        data=data,
        kind=KINDS[task.name],
        why=f"The models are {task.shown}.",
        keys=(*keys, *(tokenizer_keys(models) if task.name == "texts" else ())),
        metric="accuracy",
        metric_why="Share of items that are right; `cross_entropy` is another metric.",
        classes=_stated(finder, label, names, given, models),
        expert=expert,
        domain=None if domain is None else domain.name,
        processed=any(is_media(data, name) for name in taken),
        given=bool(given),
    )


def _inputs(finder: Finder, task: Task, models: Models) -> tuple[dict[str, Any], list[str]]:
    """Keys of what the models read, and the columns in them."""
    if task.name == "texts":
        texts = _texts(finder, models)
        return texts, [*texts.values()]
    if task.name == "images":
        image = finder.need("image", ("image", "numbers"), "pictures")
        return {"input": image.name}, [image.name]
    audio = finder.need("audio", ("audio", "numbers"), "recordings")
    return {"inputs": {audio_argument(models, audio): audio.name}}, [audio.name]


def _texts(finder: Finder, models: Models) -> dict[str, Any]:
    """The column of texts, or two columns that belong together."""
    pair = finder.pair()
    if pair is not None:
        return {"text": pair[0].name, "pair": pair[1].name}
    labels = {*(models.labels() or ())}
    columns = finder.data.columns.values()
    taken = {c.name for c in columns if c.values and labels and c.values <= labels}
    return {"text": finder.text(taken | {finder.given.get("label", "")}).name}


def _as_keys(inputs: Mapping[str, Any]) -> tuple[Key, ...]:
    return tuple(Key(name, value) for name, value in inputs.items())


def _regresses(models: Models) -> bool:
    return all(label_count(expert.config) == 1 for expert in models.experts)


def _count(models: Models, expert: str | None) -> int:
    chosen = [m for m in models.experts if expert in (None, m.name)]
    return max(label_count(model.config) for model in chosen)


def _known_labels(finder: Finder, taken: Sequence[str]) -> frozenset[str] | None:
    """Names of classes in the data, by the column that has a usual name for them."""
    label = finder.find("label", ("text", "integer"), taken)
    if label is None:
        return None
    if label.name in finder.data.named:
        return frozenset(finder.data.named[label.name])
    return label.values if label.kind == "text" else None


def _stated(
    finder: Finder,
    label: Column,
    names: tuple[str, ...],
    given: tuple[str, ...],
    models: Models,
) -> tuple[str, ...]:
    """Names of classes that the study must state, because no file that it reads does.

    Raises:
        InputError: If the data have names for classes, and nothing gives their order.
    """
    if given:
        return given
    _check_order(finder.data, label, names)
    if label.kind != "text" or label.name in finder.data.named:
        return ()
    if names:
        own = tuple(models.labels() or ()) == names and models.heads != "average"
        return () if own and models.heads != "own" else names
    values = sorted(map(str, label.values))
    raise InputError(
        f"--data {finder.data.given}: column {label.name!r} has names ({shortened(values)}), and "
        "no model says which number each has (id2label in config.json); give them in the order of "
        f"the model's numbers: --classes {','.join(values[:8])}"
    )


def _check_order(data: DataFile, label: Column, names: tuple[str, ...]) -> None:
    """Refuse numbers of classes that a file counts in another order than the models.

    Raises:
        InputError: In one line.
    """
    own = tuple(data.named.get(label.name, ()))
    if own and names and own != names and {*own} == {*names}:
        raise InputError(
            f"--data {data.given}: column {label.name!r}: expected numbers in the order of the "
            f"models, {shortened(names)}, received those of {shortened(own)}; write the names of "
            "the classes instead"
        )


def _label_why(label: Column, names: tuple[str, ...]) -> str:
    if label.kind == "integer":
        return f"Numbers of {len(label.values)} classes."
    return f"Its values are the classes of the models ({shortened(names)})."


#: Task -> what proposes an evaluator where no classes are asked for.
PROPOSED: Mapping[str, Callable[[Finder, Models], Proposal]] = {
    "language": _language,
    "writing": _writing,
    "masks": masks,
    "hearing": speech,
    "questions": questions,
    "encoding": embeddings,
}
