"""Runs the fuzzers: ``make fuzz``, with ``SEED=``, ``COUNT=`` and ``KIND=``.

Every module of this folder that has a ``KIND`` is a fuzzer: ``prepare(folder)`` makes real files
once, ``check(prepared, scratch, seed)`` damages one of them as the seed says, gives it to the real
reader or verb, and raises where a promise does not hold. A seed names one damaged file on every
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests.fuzz

#: Seeds that a process checks before it reports.
CHUNK = 250
PROCESSES = 2
#: A link to itself in every folder that paths are relative to.
LOOP = "loop"


@dataclass(frozen=True)
class Found:
    """What one seed found."""

    kind: str
    seed: int
    what: str

    @property
    def command(self) -> str:
        """The command that finds it again."""
        return f"make fuzz KIND={shlex.quote(self.kind)} SEED={self.seed} COUNT=1"


def fuzzers() -> dict[str, Any]:
    """Kind -> its module, by name."""
    names = (each.name for each in pkgutil.iter_modules(tests.fuzz.__path__))
    sources = {name: Path(tests.fuzz.__path__[0], f"{name}.py").read_text() for name in names}
    modules = [
        importlib.import_module(f"tests.fuzz.{name}")
        for name, source in sources.items()
        if "\nKIND" in source
    ]
    return {module.KIND: module for module in modules}


def check_seeds(kind: str, prepared: Path, seeds: Sequence[int]) -> list[Found]:
    """Check seeds of a kind, in a scratch folder of their own that is the current one."""
    module = fuzzers()[kind]
    found = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="mergesearch-fuzz-") as scratch:
        for folder in (Path(scratch), prepared):
            if not (folder / LOOP).is_symlink():
                (folder / LOOP).symlink_to(LOOP)  # a path that mutations name
        os.chdir(scratch)
        try:
            for seed in seeds:
                try:
                    module.check(prepared, Path(scratch), seed)
                except Exception as finding:
                    told = " ".join(f"{type(finding).__name__}: {finding}".split())
                    detail = "" if len(seeds) > 1 else f"\n{traceback.format_exc()}"
                    found.append(Found(kind, seed, told[:400] + detail))
        finally:
            os.chdir(here)
    return found


def _quiet() -> None:
    """Threads, hub and cache of a process that checks seeds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MERGESEARCH_CACHE", tempfile.gettempdir() + "/mergesearch-fuzz-cache")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # warnings about damaged files


def run(kinds: Sequence[str], first: int, count: int) -> list[Found]:
    """Check ``count`` seeds of every kind in parallel processes; progress goes to the terminal."""
    known = fuzzers()
    found: list[Found] = []
    done = dict.fromkeys(kinds, 0)
    spent = dict.fromkeys(kinds, 0.0)
    with tempfile.TemporaryDirectory(prefix="mergesearch-fuzz-real-") as folder:
        for kind in kinds:
            prepared = Path(folder, kind)
            prepared.mkdir()
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
                known[kind].prepare(prepared)
        print(f"seeds {first} to {first + count - 1} of {len(kinds)} kinds", flush=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_quiet) as pool:
            futures = {
                pool.submit(_timed, kind, Path(folder, kind), seeds): (kind, len(seeds))
                for seeds in _chunks(first, count)
                for kind in kinds
            }
            for future in as_completed(futures):
                kind, size = futures[future]
                new, seconds = future.result()
                found += new
                done[kind] += size
                spent[kind] += seconds
                _progress(done, count * len(kinds), found)
    _table(done, spent, found)
    return found


def _timed(kind: str, prepared: Path, seeds: Sequence[int]) -> tuple[list[Found], float]:
    begun = time.process_time()
    return check_seeds(kind, prepared, seeds), time.process_time() - begun


def _chunks(first: int, count: int) -> Iterator[range]:
    for start in range(first, first + count, CHUNK):
        yield range(start, min(start + CHUNK, first + count))


def _progress(done: dict[str, int], total: int, found: Sequence[Found]) -> None:
    end = "\r" if sys.stdout.isatty() else "\n"
    print(f"{sum(done.values()):>7} of {total}, {len(found)} findings", end=end, flush=True)


def _table(done: dict[str, int], spent: dict[str, float], found: Sequence[Found]) -> None:
    width = max(map(len, done))
    print(f"\n{'kind':<{width}}    seeds  findings  CPU s  ms each")
    for kind, seeds in done.items():
        findings = sum(each.kind == kind for each in found)
        each = 1000 * spent[kind] / max(seeds, 1)
        print(f"{kind:<{width}}  {seeds:>7}  {findings:>8}  {spent[kind]:>5.0f}  {each:>7.1f}")
    for one in sorted(found, key=lambda each: (each.kind, each.seed)):
        print(f"\n{one.command}\n  {one.what}")


def main() -> None:
    """Entry point: ends with code 1 where anything was found."""
    parser = argparse.ArgumentParser(description="Seeded mutations of real files.")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=5000, help="seeds of every kind")
    parser.add_argument("--kind", default="", help="kinds, with commas; default: all")
    given = parser.parse_args()
    known = fuzzers()
    kinds = [kind for kind in given.kind.split(",") if kind] or sorted(known)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        parser.error(f"--kind: expected {', '.join(sorted(known))}, received {unknown[0]}")
    sys.exit(1 if run(kinds, given.seed, given.count) else 0)


if __name__ == "__main__":
    main()
