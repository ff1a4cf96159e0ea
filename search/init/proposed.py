"""An evaluator as it is proposed for one set of items, and what all kinds of proposals need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.search.init.commented import Key
from mergesearch.search.init.models import PROCESSORS, TOKENIZERS, Models, folder_with
from mergesearch.search.init.tables import Column, DataFile


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


def tokenizer_keys(models: Models) -> tuple[Key, ...]:
    """The tokenizer, where it is not the base's."""
    path = folder_with(models, TOKENIZERS)
    if path is None:
        return ()
    return (Key("tokenizer", path, "The base has none."),)


def expert_of(data: DataFile, models: Models, labels: frozenset[str] | None) -> str | None:
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


def is_media(data: DataFile, column: str) -> bool:
    """Whether a column has pictures or recordings, rather than arrays."""
    return data.columns[column].kind in ("image", "audio")


def audio_argument(models: Models, column: Column, default: str = "input_values") -> str:
    """What the models call recordings: as the column, or as the feature extractor says.

    Args:
        models: Base and experts.
        column: Of the recordings, or of arrays.
        default: For arrays, where no model has a feature extractor.
    """
    if column.kind == "numbers":
        known = ("input_values", "input_features")
        return column.name if column.name in known else default
    path = folder_with(models, PROCESSORS)
    folder = Path(path or models.base.folder or "")
    file = folder / PROCESSORS[0]
    names = read_json(file).get("model_input_names") if file.is_file() else None
    return "input_features" if "input_features" in (names or ()) else "input_values"


def has_template(folder: Path) -> bool:
    """Whether a folder has a chat template, of a tokenizer or of a processor."""
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and bool(read_json(config).get("chat_template"))
    beside = ("chat_template.jinja", "chat_template.json")
    return inside or any((folder / name).is_file() for name in beside)
