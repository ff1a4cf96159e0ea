"""Arenas: base and basis as flat files that every process of a host maps, written once.

One file per prepared basis, ``(1 + K, size)`` with the base first, and a JSON sheet that says what it is. The sheet
names the file by its content and is written last, so that a reader finds a whole arena or none. The content's hash
is compared whenever an arena is opened: damage is found before a trial is measured on it. One process prepares under
a lock, the others wait for it; what a killed one left is removed by the next to hold the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merging.checkpoint import Checkpoint
from merging.errors import RecipeError, RunFolderError
from merging.field import Field
from merging.kernels import Form, accumulation_dtype
from merging.layout import Layout
from merging.memo import Memo
from merging.operators import Basis, get_operator
from merging.preflight import check_family
from merging.recipe import Recipe

FORMAT = 2
_PART = ".part"
_BLOCK = 1 << 22  # bytes read at a time when hashing


@dataclass(frozen=True, eq=False)
class Arenas:
    """What a trial reads: base and basis over one flat index, mapped read-only.

    Attributes:
        layout: Places of the tensors.
        form: How the basis combines with the base.
        base: ``(size,)``, fp32 (fp64 where the base holds fp64); padding is zero.
        basis: ``(K, size)``, the same dtype.
        angles: Angle between base and row over the flat index, for the form ``slerp`` only.
    """

    layout: Layout
    form: Form
    base: npt.NDArray[Any]
    basis: npt.NDArray[Any]
    angles: Field | None = None


@dataclass(frozen=True, eq=False)
class _Plan:
    """An arena to be: what identifies it, and what fills it."""

    key: str
    base: Checkpoint
    layout: Layout
    sheet: Mapping[str, Any]  # all of the JSON sheet but what the basis adds to it
    prepare: Callable[[], Basis]  # only called where there is no arena yet: it may take hours

    @property
    def shape(self) -> tuple[int, int]:
        return 1 + int(self.sheet["directions"]), self.layout.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(str(self.sheet["dtype"]))

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def open_arenas(recipe: Recipe, folder: Path, *, verify: bool = True) -> Arenas:
    """Map the arenas of ``recipe``, preparing them first if this host does not have them.

    The coefficients of the recipe play no part. An arena that is damaged, or that was made from files that have
    changed since, is prepared again.

    Args:
        recipe: Sources, operator and hyperparameters.
        folder: Where arenas of this host are kept; created if missing. What hyperparameters share is kept beside them.
        verify: Compare the content with its hash, which reads all of it once (at memory bandwidth).

    Raises:
        CheckpointError: If a source is missing, damaged, or does not fit the base.
        RecipeError: If the recipe speaks of another layout, or of other weights than its sources now hold.
        RunFolderError: If the folder cannot be written, or is full.
    """
    memo = Memo(folder / "shared")
    base = Checkpoint.open(recipe.base.path, recipe.base.name, memo)
    experts = [Checkpoint.open(expert.path, expert.name, memo) for expert in recipe.experts]
    layout = check_family(base, experts)
    if recipe.layout not in ("", layout.digest):
        raise RecipeError(
            f"recipe: expected layout {layout.digest}, that of {recipe.base.path}, received {recipe.layout}; "
            "the recipe was made for another base"
        )
    plan = _plan(recipe, base, experts, layout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arenas = _mapped(plan, folder, verify)
        if arenas is None:
            with _lock(folder):
                arenas = _mapped(plan, folder, verify) or _prepared(plan, recipe, [base, *experts], folder)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: expected a writable folder with {plan.bytes / 1e9:.2g} GB free for arenas, received: {error}"
        ) from error
    return arenas


def _plan(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint], layout: Layout) -> _Plan:
    operator = get_operator(recipe.operator)
    options = operator.check(layout, len(experts), recipe.options)
    sheet = {
        "format": FORMAT,
        "layout": layout.digest,
        "dtype": accumulation_dtype(layout),
        "directions": operator.directions(len(experts), options),
        "size": layout.size,
        "files": _stamps(recipe, [base, *experts]),
    }
    return _Plan(recipe.basis_key, base, layout, sheet, lambda: operator.prepare(base, experts, **options))


def _stamps(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[list[Any]]:
    """Path, size and time of the weight files of sources that the key knows by path only."""
    stamps: list[list[Any]] = []
    for source, checkpoint in zip((recipe.base, *recipe.experts), checkpoints, strict=True):
        if not source.fingerprint:
            for file in sorted({info.file.resolve() for info in checkpoint.tensors.values()}):
                status = file.stat()
                stamps.append([str(file), status.st_size, status.st_mtime_ns])
    return stamps


def _mapped(plan: _Plan, folder: Path, verify: bool) -> Arenas | None:
    """The arena if it is there, whole, and what the plan asks for."""
    try:
        sheet = json.loads((folder / f"{plan.key}.json").read_text(encoding="utf-8"))
        content, form, angles = (sheet.pop(key) for key in ("content", "form", "angles"))
        file = _arena_file(folder, plan.key, content)
        if sheet != plan.sheet or file.stat().st_size != plan.bytes:
            return None
        if verify and _hash(file) != content:
            return None
        rows = np.memmap(file, dtype=plan.dtype, mode="r", shape=plan.shape)
        arc = None if angles is None else Field.from_dict(angles)
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):  # missing, or a sheet that is not one
        return None
    return Arenas(plan.layout, form, rows[0], rows[1:], arc)


def _prepared(plan: _Plan, recipe: Recipe, sources: Sequence[Checkpoint], folder: Path) -> Arenas:
    """Write the arena and its sheet; the caller holds the lock."""
    for leftover in folder.glob(f"*{_PART}"):
        leftover.unlink()
    _check_fingerprints(recipe, sources)
    part = folder / f"{plan.key}.arena{_PART}"
    basis = plan.prepare()
    _write_rows(plan, basis, part)
    content = _hash(part)
    file = _arena_file(folder, plan.key, content)
    os.replace(part, file)
    arc = angle_field(basis, plan.layout)
    made = {"form": basis.form, "angles": None if arc is None else arc.to_dict(), "content": content}
    _write_sheet({**plan.sheet, **made}, folder / f"{plan.key}.json")
    for other in folder.glob(f"{plan.key}.*.arena"):
        if other != file:
            other.unlink()  # made from files that have changed since; whoever has it mapped keeps it
    arenas = _mapped(plan, folder, verify=False)
    if arenas is None:
        raise RunFolderError(f"{folder}: expected the arena that was just written, received another; is it shared?")
    return arenas


def _check_fingerprints(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    for source, checkpoint in zip((recipe.base, *recipe.experts), checkpoints, strict=True):
        if source.fingerprint and checkpoint.fingerprint() != source.fingerprint:
            raise RecipeError(
                f"source {source.name!r} ({source.path}): expected weights {source.fingerprint[:12]}, received "
                f"{checkpoint.fingerprint()[:12]}; they changed since the recipe was made, restore them"
            )


def angle_field(basis: Basis, layout: Layout) -> Field | None:
    """The angles of a basis over the flat index, one segment per tensor; None for other forms than ``slerp``."""
    if basis.angles is None:
        return None
    specs = [spec for spec in layout.tensors if spec.size]
    boundaries = [spec.start for spec in specs] + [layout.size]
    return Field(np.array(boundaries), np.array([[basis.angles(spec.name) for spec in specs]]))


def _write_rows(plan: _Plan, basis: Basis, part: Path) -> None:
    """Stream the tensors to their places; what lies between them stays zero (never written)."""
    import torch

    wide, itemsize = getattr(torch, str(plan.sheet["dtype"])), plan.dtype.itemsize
    with part.open("wb") as file:
        file.truncate(plan.bytes)
        for spec in plan.layout.tensors:
            for row, tensor in enumerate([plan.base.read(spec.name), *basis.rows(spec.name)]):
                file.seek((row * plan.layout.size + spec.start) * itemsize)
                file.write(tensor.to(wide).contiguous().reshape(-1).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_sheet(sheet: Mapping[str, Any], path: Path) -> None:
    part = path.with_name(f"{path.name}{_PART}")
    with part.open("w", encoding="utf-8") as file:
        json.dump(sheet, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the two new names
    finally:
        os.close(handle)


def _arena_file(folder: Path, key: str, content: str) -> Path:
    return folder / f"{key}.{content[:16]}.arena"


def _hash(path: Path) -> str:
    """XXH3 of a file: finds damage at memory bandwidth; nobody is kept from forging it."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
