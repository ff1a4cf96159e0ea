"""``config.json`` with the types of the keys that are read somewhere checked once, here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import path_shown

CONFIG = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Content of the ``config.json`` of a folder, ``{}`` when there is none.

    Keys that only transformers reads are left to it, which names them.

    Raises:
        CheckpointError: If it cannot be read, or a key has a value of another type.
    """
    file = folder / CONFIG
    if not file.is_file():
        return {}
    config = read_json(file)
    check_config(config, path_shown(file))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse keys of a configuration that have values of another type; null stands for none.

    Args:
        config: Content of ``config.json``.
        where: The file, as errors name it.

    Raises:
        CheckpointError: With the key.
    """
    node = Node(config, where, CheckpointError)
    for key, check in _CHECKS.items():
        if node.has(key):
            check(node.get(key))
    if node.has("text_config"):
        check_config(config["text_config"], f"{where}: text_config")


def _name(node: Node) -> None:
    """Refuse names that are not printable: libraries write them to the terminal as they are."""
    if not node.text().isprintable():
        raise node.wrong("a name that can be printed")


def _names(node: Node) -> None:
    for element in node.elements():
        _name(element)


def _numbers_of_classes(node: Node) -> None:
    for _, number in node.members():
        if isinstance(number.value, str) and number.value.isascii() and number.value.isdigit():
            continue  # some files have texts, as JSON has for keys
        number.integer()


def _names_of_classes(node: Node) -> None:
    for _, name in node.members():
        if not isinstance(name.value, str | int | float):
            raise name.wrong("the name of a class")


#: Key -> what checks its value.
_CHECKS: Mapping[str, Callable[[Node], Any]] = {
    "model_type": _name,
    "_class_name": _name,
    "architectures": _names,
    "id2label": _names_of_classes,
    "label2id": _numbers_of_classes,
    "num_labels": Node.integer,
    "text_config": Node.mapping,
    "tie_word_embeddings": Node.boolean,
    "vocab_size": Node.integer,
}
