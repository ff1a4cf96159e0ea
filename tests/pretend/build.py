"""Compiles the pretend card's library, once for a torch and a source.

``python -m tests.pretend.build`` builds it and says where it is, or why it cannot be built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
UNITS = ("card.cpp", "operators.cpp")
FLAGS = ("-O1", "-std=c++20", "-fPIC")
#: Built libraries; they go with the environment whose torch they were built for.
FOLDER = Path(sys.prefix, "var", "mergesearch-pretend-card")


class NoCompilerError(Exception):
    """The library cannot be built here; tests skip with the message."""


class RefusedError(Exception):
    """The compiler refused the source; tests fail with its messages."""


def library() -> Path:
    """The library; it is built if it is not there yet.

    Raises:
        NoCompilerError: If there is none.
        RefusedError: If the compiler refuses the source.
    """
    import fcntl

    target = FOLDER / f"card-{_digest()}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoCompilerError("expected a C++ compiler (g++, or $CXX), found none; apt install g++")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        if not target.exists():
            for old in FOLDER.glob("card-*.so"):
                old.unlink()
            _build(compiler, target)
    return target


def _digest() -> str:
    """Identifies the source, the flags and the torch that a library was built for."""
    content = hashlib.sha256(version("torch").encode())
    content.update(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _build(compiler: str, target: Path) -> None:
    """Compile both units at a time, then link them."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    include = torch / "include"
    paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    objects = [target.with_name(f"{unit}.o") for unit in UNITS]
    running = [
        subprocess.Popen(
            [compiler, *FLAGS, *paths, "-c", str(SOURCES / unit), "-o", str(made)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for unit, made in zip(UNITS, objects, strict=True)
    ]
    for process in running:
        _check(process.communicate()[1], process.returncode)
    part = target.with_suffix(".part")
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    linked = subprocess.run(
        [compiler, "-shared", *map(str, objects), "-o", str(part), *libraries],
        stderr=subprocess.PIPE,
        text=True,
    )
    _check(linked.stderr, linked.returncode)
    part.replace(target)
    for made in objects:
        made.unlink()


def _check(errors: str, code: int) -> None:
    if code:
        raise RefusedError(f"the compiler refused the pretend card:\n{errors}")


def main() -> None:
    """Build the library; the tests fail or skip where it could not be built."""
    started = time.perf_counter()
    try:
        path = library()
    except (NoCompilerError, RefusedError) as error:
        print(f"pretend card: not built: {error}")
        return
    print(f"pretend card: {path} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
