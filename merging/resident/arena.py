"""Arenas: base and basis as flat files that every process of a host maps, written once.

One file per prepared basis, tensor after tensor, and a JSON sheet that says how each is stored
(:mod:`mergesearch.merging.resident.encodings`). The sheet names the file by its content and is
written last, so that a reader sees a whole arena or none. The content's hash is compared whenever
an arena is opened, so that damage shows before a trial is measured on it. One process prepares
under a lock, the others wait for it; what a killed one left is removed by the next to hold the
lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.alignment.spec import AlignSpec, item_versions
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import RecipeError, RunFolderError
from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.family.integers import warn_of_integers
from mergesearch.merging.family.special_tensors import SpecialTensors
from mergesearch.merging.foreign.own_json import read_own_json
from mergesearch.merging.kernels.dispatch import accumulation_dtype
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.spans import ITEMSIZE, RowsSetting
from mergesearch.merging.models.calibration_spec import file_versions
from mergesearch.merging.operators import Basis, Operator, get_operator
from mergesearch.merging.policies import parse_policies
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.resident.arena_files import (
    PART,
    arena_file,
    hash_file,
    locked,
    sheet_file,
    write_sheet,
)
from mergesearch.merging.resident.arena_stamp import is_whole, remember, remove_stamps
from mergesearch.merging.resident.encodings.base import Encoding
from mergesearch.merging.resident.encodings.packing import Packing, StoredTensor
from mergesearch.merging.resident.encodings.table import planned_encoding
from mergesearch.merging.resident.tensor_writer import EncodedTensor, encode_tensor, write_parts
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec
from mergesearch.merging.tensors.memo import Memo, mark_used
from mergesearch.merging.tensors.parallel import parallel_map, run_single_threaded
from mergesearch.merging.tensors.place import HOST, Place
from mergesearch.merging.tensors.source import shapes_of
from mergesearch.merging.tensors.stacks import stack_layouts

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array

FORMAT = 4


@dataclass(frozen=True, eq=False)
class Arenas:
    """Base and basis over one flat index: all that a trial reads.

    Attributes:
        layout: Positions of the tensors.
        form: How the basis combines with the base.
        memory: uint8 ``(bytes,)``, the arena: a file, mapped read-only, or one copy of it on a
            card.
        packing: What lies where in it, and how it is stored.
        angles: Angle between base and row over the flat index, for the form ``slerp`` only.
        special: Tensors whose weighted sum is not yet what is merged.
        copied: Floating tensors that stay as they are in the base, and are not in the arenas.
        name: Says which key and content the memory is of.
    """

    layout: Layout
    form: Form
    memory: Array
    packing: Packing
    angles: Field | None = None
    special: SpecialTensors = field(default_factory=SpecialTensors)
    copied: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True, eq=False)
class _Plan:
    """An arena that may still have to be written: its identity and its content."""

    key: str
    family: ModelFamily
    encoding: Encoding
    density: float  # of masked rows, as declared
    sheet: Mapping[str, Any]  # all of the JSON sheet but what the basis adds to it
    prepare: Callable[[], Basis]  # only called where there is no arena yet: it may take hours

    @property
    def layout(self) -> Layout:
        return self.family.layout

    @property
    def bytes(self) -> int:
        """Size of the arena with every row in the planned encoding, about what it takes."""
        bits = int(self.sheet["directions"]) * self.encoding.bits(
            _widest(self.family.experts), self.density
        )
        base = sum(spec.size * ITEMSIZE[spec.dtype] for spec in self.layout.tensors)
        return base + int(self.layout.size * bits / 8)

    def packed(self, stored: Mapping[str, StoredTensor]) -> Packing:
        return Packing(self.layout, int(self.sheet["directions"]), self.sheet["dtype"], stored)


def open_arenas(
    recipe: Recipe,
    folder: Path,
    *,
    rows: RowsSetting = "auto",
    verify: bool = True,
    threads: int = 1,
    place: Place = HOST,
) -> Arenas:
    """Map the arenas of ``recipe``, preparing them first if this host does not have them.

    The coefficients of the recipe play no part. An arena that is damaged, or that was made from
    files that have changed since, is prepared again.

    Args:
        recipe: Sources, operator and hyperparameters.
        folder: Where arenas of this host are kept; created if missing. What hyperparameters share
            is kept beside them.
        rows: The encoding of rows; ``auto`` takes the smallest exact one.
        verify: Compare the content with its hash, which reads all of it once (at memory bandwidth).
        threads: Tensors that are prepared at once; changes no bit of them.
        place: Where heavy work of preparing is done; rows depend on it within rounding.

    Raises:
        CheckpointError: If a source is missing, damaged, or does not fit the base.
        RecipeError: If the recipe speaks of another layout, or of other weights than its sources
            now hold.
        RunFolderError: If the folder cannot be written, or is full.
    """
    family = open_family(recipe, Memo(folder / "shared"))
    layout = family.layout
    if recipe.layout not in ("", layout.digest):
        raise RecipeError(
            f"recipe: expected layout {layout.digest}, that of {recipe.base.path}, received "
            f"{recipe.layout}; the recipe was made for another base"
        )
    plan = _plan(recipe, family, rows, place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arenas = _mapped(plan, folder, verify)
        if arenas is None:
            with locked(folder):
                arenas = _mapped(plan, folder, verify) or _prepared(plan, recipe, folder, threads)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: expected a writable folder with {plan.bytes / 1e9:.2g} GB free for arenas, "
            f"received: {error}"
        ) from error
    return arenas


def _plan(recipe: Recipe, family: ModelFamily, rows: RowsSetting, place: Place) -> _Plan:
    operator = get_operator(recipe.operator)
    layout = family.layout
    experts = len(recipe.experts)
    options = operator.check(layout, experts, recipe.options)
    family.check(operator)
    encoding = planned_encoding(operator, options, rows)
    sheet = {
        "format": FORMAT,
        "encoding": encoding.name,
        "layout": layout.digest,
        "dtype": accumulation_dtype(layout),
        "directions": operator.directions(experts, options),
        "size": layout.size,
        "files": [
            *_weight_file_versions(recipe, family.sources),
            *file_versions(options),
            *(each for spec in _align(recipe).values() for each in item_versions(spec)),
        ],
        "vocabulary": "" if family.alignment is None else family.alignment.digest,
        **_divided(operator, family),
    }
    key = arena_key(recipe, rows, place)
    density = operator.density(options)
    return _Plan(
        key, family, encoding, density, sheet, lambda: family.prepare(operator, options, place)
    )


def arena_key(recipe: Recipe, rows: RowsSetting, place: Place = HOST) -> str:
    """The name under which a host keeps the arena: what it holds, in which form, made where."""
    made: list[str] = [] if rows == "auto" else [rows]
    made += [] if place.is_host else [place.device.partition(":")[0]]
    return "-".join([recipe.basis_key, *made])


def _align(recipe: Recipe) -> Mapping[str, AlignSpec]:
    """How experts are brought into the coordinates of the base."""
    return parse_policies(recipe.special).align


def _weight_file_versions(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[list[Any]]:
    """Path, size and time of the weight files of sources that the key knows by path only."""
    return [
        _version(file)
        for source, checkpoint in zip((recipe.base, *recipe.experts), checkpoints, strict=True)
        if not source.fingerprint
        for file in checkpoint.files
    ]


def _version(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def _divided(operator: Operator, family: ModelFamily) -> dict[str, str]:
    """How stacked and fused tensors are divided, where rows depend on it and there are some."""
    combined = ("blend", "stack")  # of operators, which may be on matrices
    if operator.family not in ("spectral", "column") and operator.name not in combined:
        return {}
    found = stack_layouts(shapes_of(family.layout), family.base.config)
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
    return {"divided": digest[:16]} if found else {}


def _mapped(plan: _Plan, folder: Path, verify: bool) -> Arenas | None:
    """The arena if it is there, whole, and what the plan asks for."""
    try:
        sheet = read_own_json(sheet_file(folder, plan.key)) or {}
        content, form, angles, stored = (
            sheet.pop(key) for key in ("content", "form", "angles", "tensors")
        )
        file = arena_file(folder, plan.key, content)
        packing = plan.packed({name: StoredTensor.from_dict(one) for name, one in stored.items()})
        if sheet != plan.sheet or file.stat().st_size != packing.size:
            return None
        if verify and not is_whole(file, content):
            return None
        memory = np.memmap(file, dtype=np.uint8, mode="r")
        mark_used(sheet_file(folder, plan.key))
        arc = None if angles is None else Field.from_dict(angles)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecipeError):
        return None  # missing, or a sheet that is not one
    special = plan.family.special
    copied = plan.family.copied
    return Arenas(plan.layout, form, memory, packing, arc, special, copied, file.name)


def _prepared(plan: _Plan, recipe: Recipe, folder: Path, threads: int) -> Arenas:
    """Write the arena and its sheet, and map it; the caller holds the lock."""
    for leftover in folder.glob(f"*{PART}"):
        leftover.unlink()
    _check_fingerprints(recipe, plan.family.sources)
    warn_of_integers(plan.family)
    basis = run_single_threaded(plan.prepare, threads)
    file = _write_arena(plan, basis, folder, threads)
    for other in folder.glob(f"{plan.key}.*.arena"):
        if other != file:
            # Made from files that have changed since; whoever has it mapped keeps it.
            remove_stamps(other)
            other.unlink()
    arenas = _mapped(plan, folder, verify=False)
    if arenas is None:
        raise RunFolderError(
            f"{folder}: expected the arena that was just written, received another; is it shared?"
        )
    return arenas


def _write_arena(plan: _Plan, basis: Basis, folder: Path, threads: int) -> Path:
    """Write the rows of ``basis``, then the sheet that says what they are."""
    part = folder / f"{plan.key}.arena{PART}"
    stored = _write_tensors(plan, basis, part, threads)
    content = hash_file(part)
    file = arena_file(folder, plan.key, content)
    os.replace(part, file)
    remember(file, content)
    angles = angle_field(basis, plan.layout)
    made = {
        "form": basis.form,
        "angles": None if angles is None else angles.to_dict(),
        "tensors": {name: one.to_dict() for name, one in stored.items()},
        "content": content,
    }
    write_sheet({**plan.sheet, **made}, sheet_file(folder, plan.key))
    return file


def _write_tensors(plan: _Plan, basis: Basis, part: Path, threads: int) -> dict[str, StoredTensor]:
    """Stream the tensors to the file, in order; what lies between their parts stays zero.

    No more than ``threads`` tensors are held in memory.
    """
    specs = [spec for spec in plan.layout.tensors if spec.size]
    stored: dict[str, StoredTensor] = {}

    def work(spec: TensorSpec) -> EncodedTensor:
        return encode_tensor(plan.family, basis, spec, plan.encoding, str(plan.sheet["dtype"]))

    def size_of(spec: TensorSpec) -> int:
        return spec.size * ITEMSIZE[spec.dtype] * (1 + basis.directions)

    at = 0
    with part.open("wb") as file:
        for spec, encoded in zip(specs, parallel_map(work, specs, threads, size_of), strict=True):
            stored[spec.name] = encoded.stored
            parts = plan.packed(stored).parts_of(spec, at)
            write_parts(file.fileno(), encoded, parts)
            at = parts.stop
        file.truncate(at)
        file.flush()
        os.fsync(file.fileno())
    return stored


def _check_fingerprints(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    for source, checkpoint in zip((recipe.base, *recipe.experts), checkpoints, strict=True):
        if source.fingerprint and checkpoint.fingerprint() != source.fingerprint:
            raise RecipeError(
                f"source {source.name!r} ({source.path}): expected weights "
                f"{source.fingerprint[:12]}, received {checkpoint.fingerprint()[:12]}; they "
                "changed since the recipe was made, restore them"
            )


def angle_field(basis: Basis, layout: Layout) -> Field | None:
    """The angles of a basis over the flat index, one segment per tensor.

    None for other forms than ``slerp``.
    """
    if basis.angles is None:
        return None
    specs = [spec for spec in layout.tensors if spec.size]
    boundaries = [spec.start for spec in specs] + [layout.size]
    return Field(np.array(boundaries), np.array([[basis.angles(spec.name) for spec in specs]]))


def _widest(experts: Sequence[Checkpoint]) -> str:
    """The widest dtype in which an expert stores a tensor."""
    dtypes = {dtype for expert in experts for _, dtype in expert.merged.values()}
    return max(dtypes, key=lambda dtype: ITEMSIZE[dtype], default="float32")
