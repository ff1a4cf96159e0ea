"""Digests of what lies at the paths of evaluators, which are the same wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

#: Keys of evaluators whose paths hold items: every byte counts.
ITEMS = ("data", "file", "include_path")
#: Keys whose paths are checkpoints, of which tokenizer and processor are used.
CHECKPOINTS = ("processor", "tokenizer", "teachers")
#: Files of a checkpoint that say how texts, pictures and recordings are read.
SETTINGS = (".json", ".txt", ".model", ".jinja")
#: Bytes of a file that are read at a time, and of a path that are read at most; what lies beyond
#: counts by its name and size.
BLOCK = 1 << 20
MOST = 4 << 30


def without_places(evaluators: Any) -> Any:
    """The sections of evaluators, with digests of contents instead of paths.

    Paths where nothing lies stay as they are. Files of functions keep their name alone: the
    sections hold digests of their code.
    """
    return _replaced(evaluators, "")


def _replaced(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        inner = key if key in (*ITEMS, *CHECKPOINTS) else ""
        found = {name: _replaced(value, _key(name, inner)) for name, value in node.items()}
        sources = found.get("source")
        if isinstance(sources, Mapping):
            found["source"] = {_name(name): digest for name, digest in sources.items()}
        return found
    if isinstance(node, list):
        return [_replaced(value, key) for value in node]
    if not isinstance(node, str):
        return node
    if key in ("function", "model_class"):
        return _name(node)
    return _digest(node, key) if key in (*ITEMS, *CHECKPOINTS) else node


def _key(name: str, inner: str) -> str:
    """The key of a value in a mapping: its own where it is known, else that of the mapping."""
    known = (*ITEMS, *CHECKPOINTS, "function", "model_class")
    return name if name in known else inner if inner != "data" else ""


def _name(reference: str) -> str:
    """A reference ``file.py:name`` without the folder; others as they are."""
    file, separator, name = reference.rpartition(":")
    return f"{Path(file).name}{separator}{name}" if file.endswith(".py") else reference


def _digest(text: str, key: str) -> str:
    path = Path(text)
    if not path.is_absolute():
        return text
    try:
        return _content(path, key) if path.exists() else text
    except OSError:  # what cannot be read is known by its place
        return text


def _content(path: Path, key: str) -> str:
    files = [path] if path.is_file() else sorted(_files(path, key))
    stamps = tuple(
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    )
    return _hashed(path, stamps)


def _files(folder: Path, key: str) -> Iterator[Path]:
    """Files of a folder that count, none of them hidden."""
    if key in CHECKPOINTS:
        yield from (f for f in folder.iterdir() if f.suffix in SETTINGS and f.is_file())
        return
    for file in folder.rglob("*"):
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts):
            yield file


@lru_cache(maxsize=256)
def _hashed(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    left = MOST
    for name, size, _ in stamps:
        # A single file may be renamed.
        digest.update(f"{'' if name == '.' else name}:{size};".encode())
        left -= size
        if left < 0:
            continue
        with (path if name == "." else path / name).open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return f"content:{digest.hexdigest()[:32]}"
