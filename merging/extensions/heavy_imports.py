"""Large libraries imported in less time: without what few models need, and without collections.

transformers imports, with the class of any model, what is installed for special cases: the
quantiser of hqq for one kind of cache, which sets up a compiler, and the optimisers of scipy for
losses of object detection. Inside :func:`fast_imports` it receives stand-ins, which import the real
thing at its first use. Nobody else does: modules that ask for the same names get them at once.

An import makes objects that stay, so garbage collections during it look at all of them over and
over and find nothing; they take a fifth of the time.
"""

from __future__ import annotations

import builtins
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

#: Library whose imports are shortened.
IMPORTER = "transformers"
#: Module -> names that the library imports from it, and uses in special cases only, by calling them
#: or functions of theirs.
DEFERRED = {
    "hqq.core.quantize": frozenset({"Quantizer"}),
    "scipy.optimize": frozenset({"linear_sum_assignment"}),
}

#: Modules from which on an import is large.
MANY = 100

_lock = threading.Lock()
_inside = 0
_real_import = builtins.__import__


class Deferred:
    """A function or class of a module that is imported when it is used.

    Args:
        module: Name of the module.
        name: What it has there.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("_module", "_name"):  # of a copy that is not made yet
            raise AttributeError(attribute)
        return getattr(self._real(), attribute)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the real thing."""
        return self._real()(*arguments, **options)

    def _real(self) -> Any:
        return getattr(import_module(self._module), self._name)


@contextmanager
def fast_imports() -> Iterator[None]:
    """A context for imports of large libraries, and for what imports on demand."""
    collecting = gc.isenabled()
    modules = len(sys.modules)
    _enter()
    gc.disable()
    try:
        yield
    finally:
        _leave()
        if collecting:
            if len(sys.modules) - modules > MANY and not gc.get_freeze_count():
                # What was made counts as old: the next collection of the young would see all of
                # it. Where little was imported, what is young may be garbage, which would wait for
                # the rare collection of the old: models among it hold gigabytes.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _enter() -> None:
    global _inside, _real_import
    with _lock:
        if not _inside:
            _real_import = builtins.__import__
            builtins.__import__ = _import
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            builtins.__import__ = _real_import


def _import(
    name: str,
    globals: Any = None,
    locals: Any = None,
    fromlist: Any = (),
    level: int = 0,
) -> Any:
    """``__import__``, with stand-ins for what the library may do without."""
    if name in DEFERRED and level == 0 and name not in sys.modules:
        asking = str((globals or {}).get("__name__", ""))
        if asking.startswith(f"{IMPORTER}.") and fromlist and DEFERRED[name].issuperset(fromlist):
            return SimpleNamespace(**{each: Deferred(name, each) for each in fromlist})
    return _real_import(name, globals, locals, fromlist, level)
