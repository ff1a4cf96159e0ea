"""Functions and classes that a study names as ``module:name`` or ``file.py:name``.

A name is looked up among the objects that this process was given, then it is imported, once in each
process. A program gives objects that cannot be imported by their name, such as functions of a
notebook; they travel to workers beside the study.

Nothing is imported because a table does not know a name: the study must have been allowed to run
code first (``allow_code``), and whoever checks that calls :func:`find`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.extensions.import_path import admit_current_folder
from mergesearch.merging.foreign.paths import resolved

#: Name -> object that a program gave to this process.
_GIVEN: dict[str, Any] = {}
#: Name -> object that was imported in this process.
_IMPORTED: dict[str, Any] = {}
#: File -> the module made of it, with the time and size that the file had.
_FILES: dict[Path, tuple[tuple[int, int], ModuleType]] = {}


def is_reference(name: str) -> bool:
    """Whether a name is that of an object of the user's, not of a member of a table."""
    return ":" in name


def reference_to(value: Any) -> str:
    """The name of a function, class or object, as ``module:name``."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def give(objects: Mapping[str, Any]) -> None:
    """Give this process objects by name; a newer one replaces one of the same name."""
    _GIVEN.update(objects)


def given(names: Iterable[str]) -> dict[str, Any]:
    """The objects of these names that this process was given."""
    return {name: _GIVEN[name] for name in names if name in _GIVEN}


def known(name: str) -> Any:
    """The object of a name that was given or imported before, or None."""
    return _GIVEN.get(name, _IMPORTED.get(name))


def find(name: str, where: str) -> Any:
    """The object of a name, imported if this process was not given it.

    Args:
        name: ``module:name`` or ``file.py:name``.
        where: Key of the study file, for messages.

    Raises:
        InputError: If there is none, or its module cannot be imported.
    """
    if name in _GIVEN:
        return _GIVEN[name]
    module_name, _, attribute = name.rpartition(":")
    if not is_reference(name) or not attribute:
        raise InputError(
            f"{where}: expected module:name or file.py:name, received {name!r}; write, for "
            "example, scoring.py:evaluate"
        )
    if module_name == "__main__" or "<" in attribute:
        raise InputError(
            f"{where}: expected {attribute} of the program that began the study, which cannot be "
            f"imported as {name!r}; make the Study again with it in the same run folder, or move "
            "it to a module"
        )
    value: Any = _load_module(module_name, where)
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise InputError(
            f"{where}: expected a function {attribute!r} in module {module_name!r}, received none"
        )
    _IMPORTED[name] = value
    return value


def find_function(name: str, where: str) -> Callable[..., Any]:
    """The object of a name, which must be callable.

    Raises:
        InputError: If there is none, or it cannot be called.
    """
    value = find(name, where)
    if not callable(value):
        module, _, attribute = name.rpartition(":")
        raise InputError(
            f"{where}: expected a function {attribute!r} in module {module!r}, received "
            f"{type(value).__name__}"
        )
    function: Callable[..., Any] = value
    return function


def located(name: str, folder: Path) -> str:
    """The name with the absolute path of its file, if it is in a file."""
    file, _, attribute = name.rpartition(":")
    return f"{resolved(folder / file)}:{attribute}" if file.endswith(".py") else name


def check_sources(source: Mapping[str, str], where: str) -> None:
    """Refuse functions of this machine that are not those of the study.

    What a program gave is left out: it has travelled here, and its source has not.

    Args:
        source: Name of a function -> the digest of its code when the study began.
        where: Key of the study file, for messages.

    Raises:
        InputError: If the code of a function is another.
    """
    for name, began in source.items():
        here = source_digest(known(name))
        if here != began and not given([name]):
            raise InputError(
                f"{where}: {name}: expected the code that the study began with "
                f"({began}), received another ({here}); restore it"
            )


def source_digest(value: Any) -> str:
    """Hash of the source text of a function or class, or of an object's class.

    Where there is no text, it is that of the compiled code.
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    try:
        text = textwrap.dedent(inspect.getsource(named))
    except (OSError, TypeError):
        code = getattr(named, "__code__", None)
        text = named.__qualname__ if code is None else f"{code.co_code.hex()}{code.co_names}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_module(name: str, where: str) -> ModuleType:
    """Import a module or a file.

    Raises:
        InputError: If that fails, whatever the module raises.
    """
    try:
        if name.endswith(".py"):
            return _load_file(Path(name))
        admit_current_folder()
        return importlib.import_module(name)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: expected a module that can be imported, received {name!r}: "
            f"{type(error).__name__}: {text}"
        ) from None


def _load_file(file: Path) -> ModuleType:
    """The module of a file, made again where the file has changed."""
    status = file.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    if file in _FILES and _FILES[file][0] == stamp:
        return _FILES[file][1]
    name = f"mergesearch_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickling expect
    spec.loader.exec_module(module)
    _FILES[file] = stamp, module
    return module
