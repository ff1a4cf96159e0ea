"""Texts of the MiniLM zoo: three questions about the source code that every installation has.

- ``packages``: which package has this summary of a docstring?
- ``errors``: which exception has this message?
- ``modules``: which module of the standard library has this line of code?

Only the packages of the project's environment and Python's own modules are read, and nothing of
them runs. The items follow from the versions that are installed; ``constraints.txt`` pins those.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergesearch.merging import InputError

PACKAGES = (
    "matplotlib",
    "mlflow",
    "nltk",
    "numba",
    "pandas",
    "ray",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "sympy",
    "torch",
    "transformers",
)
ERRORS = (
    "AssertionError",
    "NotImplementedError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
MODULES = (
    "argparse",
    "asyncio",
    "email",
    "http",
    "importlib",
    "inspect",
    "logging",
    "multiprocessing",
    "tarfile",
    "unittest",
    "urllib",
    "xml",
)
#: Task -> names of its classes, in the order of the model's numbers.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "packages": PACKAGES,
    "errors": ERRORS,
    "modules": MODULES,
}
#: Words of a text: shorter ones say too little, longer ones are cut.
WORDS = (5, 16)
#: Characters of a line of code at least.
CODE = 30

#: Texts and class numbers of a task.
Texts = tuple[list[str], list[int]]
#: Class and text.
Found = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """Where the texts of a task come from.

    Attributes:
        packages: Whose files are read.
        read: (package, its file parsed, its lines) -> class and text of everything that is found.
    """

    packages: Sequence[str]
    read: Callable[[str, ast.Module, Sequence[str]], Found]


def summaries(package: str, tree: ast.Module, _: Sequence[str]) -> Found:
    """First lines of docstrings that name no package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if not any(name in first.lower() for name in PACKAGES):
                yield package, first


def messages(_: str, tree: ast.Module, __: Sequence[str]) -> Found:
    """Messages of exceptions that are raised, and of assertions; values become ``...``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is not None:
            yield "AssertionError", _stated(node.msg)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            raised = node.exc.func
            if isinstance(raised, ast.Name) and raised.id in ERRORS:
                yield raised.id, _stated(node.exc.args[0])


def _stated(message: ast.expr) -> str:
    """The text of a message; empty where the source states none."""
    if isinstance(message, ast.Constant):
        return message.value if isinstance(message.value, str) else ""
    if isinstance(message, ast.JoinedStr):
        return "".join(_stated(part) for part in message.values)
    if isinstance(message, ast.FormattedValue):
        return "..."
    if isinstance(message, ast.BinOp):
        return _stated(message.left)
    called = message.func if isinstance(message, ast.Call) else None
    return _stated(called.value) if isinstance(called, ast.Attribute) else ""


def statements(module: str, tree: ast.Module, lines: Sequence[str]) -> Found:
    """Statements of one line, without what is only a docstring."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Return | ast.Raise):
            continue
        stated = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        line = lines[node.lineno - 1].strip()
        if node.lineno == node.end_lineno and not stated and len(line) >= CODE:
            yield module, line


_TASKS: Mapping[str, Task] = {
    "packages": Task(PACKAGES, summaries),
    "errors": Task((*PACKAGES, *MODULES), messages),
    "modules": Task(MODULES, statements),
}


def python_files(package: str) -> list[Path]:
    """Files of a package that is not imported, without its tests, in an order without meaning.

    Raises:
        InputError: If it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"package {package!r}: expected it beside this project, found none; run make install"
        )
    root = Path(spec.origin)
    if root.name != "__init__.py":
        return [root]
    names = [path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*.py")]
    kept = [name for name in names if not any(map(_is_test, name.split("/")))]
    kept.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return [root.parent / name for name in kept]


def _is_test(part: str) -> bool:
    return part in ("test", "tests", "testing", "conftest.py") or part.startswith("test_")


def gather(task: str, most: int) -> dict[str, list[str]]:
    """Texts of every class, ``most`` of each, no two of them alike but for case.

    Packages take turns, file by file, until there are enough.

    Raises:
        InputError: If what is installed has fewer.
    """
    source = _TASKS[task]
    found: dict[str, list[str]] = {name: [] for name in CLASSES[task]}
    seen: set[str] = set()
    queues = {package: iter(python_files(package)) for package in source.packages}
    while queues and any(len(texts) < most for texts in found.values()):
        for package in tuple(queues):
            path = next(queues[package], None)
            if path is None or len(found.get(package, ())) >= most:
                del queues[package]
                _require(task, {package: found[package]} if package in found else {}, most)
                continue
            for name, text in _read(source, package, path):
                if text.lower() not in seen and len(found[name]) < most:
                    seen.add(text.lower())
                    found[name].append(text)
    _require(task, found, most)
    return found


def _require(task: str, found: Mapping[str, Sequence[str]], most: int) -> None:
    for name, texts in found.items():
        if len(texts) < most:
            raise InputError(
                f"zoo: expected {most} texts of {task} {name!r}, found {len(texts)} in the "
                "installed packages; make fewer items"
            )


def _read(source: Task, package: str, path: Path) -> Found:
    """Class and text of everything in a file that has enough words, cut to the most."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates, and code of other versions
        return
    least, most = WORDS
    for name, found in source.read(package, tree, text.splitlines()):
        words = found.split()
        if len(words) >= least or source.read is statements:
            yield name, " ".join(words[:most])


def make_items(sizes: Mapping[str, int], seed: int) -> dict[str, dict[str, Texts]]:
    """Split -> task -> texts and class numbers, each class as often as the others.

    Args:
        sizes: Split -> items of each task, rounded down to a multiple of the classes.
        seed: Of their order.
    """
    items: dict[str, dict[str, Texts]] = {split: {} for split in sizes}
    for number, (task, classes) in enumerate(CLASSES.items()):
        shares = {split: size // len(classes) for split, size in sizes.items()}
        rng = np.random.default_rng([seed, number])
        gathered = gather(task, sum(shares.values()))
        shuffled = [
            [gathered[name][i] for i in rng.permutation(len(gathered[name]))] for name in classes
        ]
        start = 0
        for split, share in shares.items():
            pairs = [(t, n) for n, own in enumerate(shuffled) for t in own[start : start + share]]
            order = rng.permutation(len(pairs))
            items[split][task] = [pairs[i][0] for i in order], [pairs[i][1] for i in order]
            start += share
    return items


def load_items(folder: Path, split: str) -> dict[str, Texts]:
    """Task -> texts and class numbers that :func:`save_items` wrote."""
    items: dict[str, Texts] = {}
    for task, classes in CLASSES.items():
        lines = (folder / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        items[task] = [one["text"] for one in rows], [classes.index(one["label"]) for one in rows]
    return items


def save_items(folder: Path, items: Mapping[str, Mapping[str, Texts]]) -> None:
    """Write ``TASK/SPLIT.jsonl`` with columns ``text``, ``label`` (its name) and ``id``."""
    for split, tasks in items.items():
        for task, (texts, labels) in tasks.items():
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"text": text, "label": CLASSES[task][label], "id": f"{split}-{task}-{number}"}
                for number, (text, label) in enumerate(zip(texts, labels, strict=True))
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
