"""What is proposed for one set of items: a kind of evaluator, its columns and its metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.family.head_names import label_count
from mergesearch.search.init.commented import Key
from mergesearch.search.init.models import PROCESSORS, TOKENIZERS, Models, folder_with
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


@dataclass(frozen=True, eq=False)
class Proposal:
    """An evaluator of one set of items.

    Attributes:
        data: The items.
        kind: Of evaluator.
        why: Why this kind.
        keys: Its columns and options.
        metric: What is measured.
        metric_why: Why that.
        classes: Names of classes that the study must state; empty where they are known.
        expert: Whose head scores the items; None where heads are not kept apart.
        domain: Column of domains, if there is one.
        processed: Whether a processor makes inputs of pictures or recordings.
        given: Whether the user named the classes.
    """

    data: DataFile
    kind: str
    why: str
    keys: tuple[Key, ...]
    metric: str
    metric_why: str
    classes: tuple[str, ...] = ()
    expert: str | None = None
    domain: str | None = None
    processed: bool = False
    given: bool = False


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
    if data.media and task.name in ("texts", "words", "language", "writing"):
        raise InputError(
            f"--data {data.given}: expected texts, as the models are {task.shown}, received a "
            f"folder of {data.media} files; give a CSV, JSONL or Parquet file"
        )
    finder = Finder(data, {role: name for role, name in columns.items() if name in data.columns})
    given = classes.get(data.name, classes.get("", ()))
    if task.name == "language":
        return _language(finder, models)
    if task.name == "writing":
        return _writing(finder, models)
    if task.name == "zero_shot":
        return _zero_shot(finder, models, tuple(given))
    if task.name == "words":
        return _words(finder, models, tuple(given))
    if task.name == "texts" and _regresses(models):
        return _numbers(finder, models)
    return _classes(finder, task, models, tuple(given))


def _language(finder: Finder, models: Models) -> Proposal:
    """Answers where there are prompts and short answers, perplexity of texts elsewhere."""
    data = finder.data
    prompt = finder.find("prompt", ("text",))
    target = None if prompt is None else finder.find("target", ("text",), (prompt.name,))
    tokenizer = _tokenizer(models)
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
    if folder is None or not _has_template(Path(folder)):
        return ()
    return (Key("chat_template", True, "The tokenizer of the base has a template."),)


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and bool(read_json(config).get("chat_template"))
    return inside or (folder / "chat_template.jinja").is_file()


def _writing(finder: Finder, models: Models) -> Proposal:
    text = finder.text(())
    target = finder.need("target", ("text",), "what should be written", (text.name,))
    keys = (
        Key("text", text.name),
        Key("target", target.name),
        Key("max_new_tokens", 2 * target.longest + 8, _longest(target)),
        *_tokenizer(models),
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
        *_tokenizer(models),
    )
    return Proposal(
        data=data,
        kind="zero_shot",
        why="The models compare pictures with texts: classes are asked for by their names.",
        keys=keys,
        metric="accuracy",
        metric_why="Share of items that are right.",
        classes=given,
        processed=_is_media(data, image.name),
        given=bool(given),
    )


def _words(finder: Finder, models: Models, given: tuple[str, ...]) -> Proposal:
    """Classes of the words of texts."""
    data = finder.data
    words = finder.need("words", ("texts",), "lists of words")
    tags = finder.need("tags", ("texts", "numbers"), "lists of tags", (words.name,))
    keys = (Key("words", words.name), Key("tags", tags.name), *_tokenizer(models))
    why = "The models give a class to every word."
    expert = _expert(data, models, None)
    return Proposal(
        data, "token_classification", why, keys, "f1", "Macro F1 over classes.", given, expert
    )


def _numbers(finder: Finder, models: Models) -> Proposal:
    """Numbers that models of one output give to texts."""
    inputs = _texts(finder, models)
    taken = [*inputs.values()]
    number = finder.need("number", ("number", "integer"), "numbers to predict", taken)
    keys = (*_as_keys(inputs), Key("number", number.name), *_tokenizer(models))
    why = "The models give one number to every text."
    reason = "Whether the numbers rank the texts right, on whatever scale."
    return Proposal(finder.data, "text_classification", why, keys, "spearman", reason)


def _classes(finder: Finder, task: Task, models: Models, given: tuple[str, ...]) -> Proposal:
    """Classes of texts, pictures or recordings."""
    data = finder.data
    inputs, taken = _inputs(finder, task, models)
    domain = finder.domain([e.name for e in models.experts], taken)
    others = [*taken, *([] if domain is None else [domain.name])]
    expert = None if domain is not None else _expert(data, models, _known_labels(finder, others))
    names = given or tuple(models.labels(expert) or ())
    label = finder.label(names, len(names) or _count(models, expert), others)
    keys = (*_as_keys(inputs), Key("label", label.name, _label_why(label, names)))
    return Proposal(
        data=data,
        kind=KINDS[task.name],
        why=f"The models are {task.shown}.",
        keys=(*keys, *(_tokenizer(models) if task.name == "texts" else ())),
        metric="accuracy",
        metric_why="Share of items that are right; `cross_entropy` is another metric.",
        classes=_stated(finder, label, names, given, models),
        expert=expert,
        domain=None if domain is None else domain.name,
        processed=any(_is_media(data, name) for name in taken),
        given=bool(given),
    )


def _is_media(data: DataFile, column: str) -> bool:
    return data.columns[column].kind in ("image", "audio")


def _inputs(finder: Finder, task: Task, models: Models) -> tuple[dict[str, Any], list[str]]:
    """Keys of what the models read, and the columns in them."""
    if task.name == "texts":
        texts = _texts(finder, models)
        return texts, [*texts.values()]
    if task.name == "images":
        image = finder.need("image", ("image", "numbers"), "pictures")
        return {"input": image.name}, [image.name]
    audio = finder.need("audio", ("audio", "numbers"), "recordings")
    return {"inputs": {_audio_argument(models): audio.name}}, [audio.name]


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


def _audio_argument(models: Models) -> str:
    """What the feature extractor calls recordings."""
    path = folder_with(models, PROCESSORS)
    folder = Path(path or models.base.folder or "")
    file = folder / PROCESSORS[0]
    names = read_json(file).get("model_input_names") if file.is_file() else None
    return "input_features" if "input_features" in (names or ()) else "input_values"


def _tokenizer(models: Models) -> tuple[Key, ...]:
    path = folder_with(models, TOKENIZERS)
    if path is None:
        return ()
    return (Key("tokenizer", path, "The base has none."),)


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


def _expert(data: DataFile, models: Models, labels: frozenset[str] | None) -> str | None:
    """Whose head scores the items, where experts keep their own.

    Raises:
        InputError: If nothing says so.
    """
    if models.heads != "own":
        return None
    names = [expert.name for expert in models.experts]
    if data.name in names:
        return data.name
    known = [n for n in names if labels and (own := models.labels(n)) and labels <= {*own}]
    if len(known) == 1:
        return known[0]
    if len(names) == 1:
        return names[0]
    first = names[0]
    raise InputError(
        f"--data {data.given}: expected to know which expert's head scores its items, as heads "
        f"differ, but neither its name nor its classes tell; name one of {', '.join(names)}, such "
        f"as --data {first}={data.given}"
    )


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
