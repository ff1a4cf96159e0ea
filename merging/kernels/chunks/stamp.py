"""What numba's compile cache must know: that code of this folder is part of a compiled function.

numba keys its cache by the file of a function, its bytecode, and what its closure holds. Code that
is emitted by functions of other files appears in none of them, so that a change there would go on
running as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

#: Files whose code other modules compile into their functions.
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.py")))


@cache
def sources_digest() -> str:
    """SHA-256 of the sources."""
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stamped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a closure that holds the digest of the sources, for numba to compile."""
    plain = function.__code__.replace(co_freevars=("sources",))
    scope = function.__globals__
    return FunctionType(plain, scope, function.__name__, None, (CellType(sources_digest()),))
