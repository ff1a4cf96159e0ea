"""Arenas: base and basis as flat files that every process of a host maps, written once.

One file per prepared basis, the base first, then its K rows, then the factors of rows that are kept
as factors, and a JSON sheet that says what it is. The sheet names the file by its content and is
written last, so that a reader sees a whole arena or none. The content's hash is compared whenever
an arena is opened, so that damage shows before a trial is measured on it. One process prepares
under a lock, the others wait for it; what a killed one left is removed by the next to hold the
lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_writer import write_at
from mergesearch.merging.errors import RecipeError, RunFolderError
from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.family.integers import warn_of_integers
from mergesearch.merging.family.special_tensors import SpecialTensors
from mergesearch.merging.kernels.dispatch import accumulation_dtype
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.models.calibration_spec import file_versions
from mergesearch.merging.operators import Basis, get_operator
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.resident.arena_files import (
    PART,
    arena_file,
    hash_file,
    locked,
    sheet_file,
    write_sheet,
)
from mergesearch.merging.resident.factor_choice import low_rank_factors
from mergesearch.merging.resident.packing import Packing, StoredFactors
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.parallel import parallel_map, run_single_threaded

if TYPE_CHECKING:
    import torch

FORMAT = 3


@dataclass(frozen=True, eq=False)
class Arenas:
    """Base and basis over one flat index, mapped read-only: all that a trial reads.

    Attributes:
        layout: Positions of the tensors.
        form: How the basis combines with the base.
        base: ``(size,)``, fp32 (fp64 where the base holds fp64); padding is zero.
        basis: ``(K, size)``, the same dtype; shorter where tensors are kept as factors.
        packing: What of the flat index lies where in ``basis``.
        factors: The rows of tensors that are kept as factors.
        angles: Angle between base and row over the flat index, for the form ``slerp`` only.
        special: Tensors whose weighted sum is not yet what is merged.
        copied: Floating tensors that stay as they are in the base, and are not in the arenas.
    """

    layout: Layout
    form: Form
    base: npt.NDArray[Any]
    basis: npt.NDArray[Any]
    packing: Packing
    factors: tuple[StoredFactors, ...] = ()
    angles: Field | None = None
    special: SpecialTensors = field(default_factory=SpecialTensors)
    copied: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Plan:
    """An arena that may still have to be written: its identity and its content."""

    key: str
    family: ModelFamily
    sheet: Mapping[str, Any]  # all of the JSON sheet but what the basis adds to it
    prepare: Callable[[], Basis]  # only called where there is no arena yet: it may take hours

    @property
    def layout(self) -> Layout:
        return self.family.layout

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(str(self.sheet["dtype"]))

    @property
    def bytes(self) -> int:
        """Size of the arena with every row whole, which is the most that it takes."""
        return self.packed({}).size * self.dtype.itemsize

    def packed(self, ranks: Mapping[str, Sequence[int]]) -> Packing:
        return Packing(self.layout, int(self.sheet["directions"]), ranks)


def open_arenas(recipe: Recipe, folder: Path, *, verify: bool = True, threads: int = 1) -> Arenas:
    """Map the arenas of ``recipe``, preparing them first if this host does not have them.

    The coefficients of the recipe play no part. An arena that is damaged, or that was made from
    files that have changed since, is prepared again.

    Args:
        recipe: Sources, operator and hyperparameters.
        folder: Where arenas of this host are kept; created if missing. What hyperparameters share
            is kept beside them.
        verify: Compare the content with its hash, which reads all of it once (at memory bandwidth).
        threads: Tensors that are prepared at once; changes no bit of them.

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
    plan = _plan(recipe, family)
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


def _plan(recipe: Recipe, family: ModelFamily) -> _Plan:
    operator = get_operator(recipe.operator)
    layout = family.layout
    experts = len(recipe.experts)
    options = operator.check(layout, experts, recipe.options)
    family.check(operator)
    sheet = {
        "format": FORMAT,
        "layout": layout.digest,
        "dtype": accumulation_dtype(layout),
        "directions": operator.directions(experts, options),
        "size": layout.size,
        "files": [*_weight_file_versions(recipe, family.sources), *file_versions(options)],
        "vocabulary": "" if family.alignment is None else family.alignment.digest,
    }
    return _Plan(recipe.basis_key, family, sheet, lambda: family.prepare(operator, options))


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


def _mapped(plan: _Plan, folder: Path, verify: bool) -> Arenas | None:
    """The arena if it is there, whole, and what the plan asks for."""
    try:
        sheet = json.loads(sheet_file(folder, plan.key).read_text(encoding="utf-8"))
        content, form, angles, ranks = (
            sheet.pop(key) for key in ("content", "form", "angles", "factors")
        )
        file = arena_file(folder, plan.key, content)
        packing = plan.packed(ranks)
        if sheet != plan.sheet or file.stat().st_size != packing.size * plan.dtype.itemsize:
            return None
        if verify and hash_file(file) != content:
            return None
        base, rows, factors = packing.split(np.memmap(file, dtype=plan.dtype, mode="r"))
        arc = None if angles is None else Field.from_dict(angles)
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None  # missing, or a sheet that is not one
    special = plan.family.special
    copied = plan.family.copied
    return Arenas(plan.layout, form, base, rows, packing, factors, arc, special, copied)


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
    ranks = _ranks_of_factors(plan, basis, threads)
    _write_rows(plan, basis, plan.packed(ranks), part, threads)
    content = hash_file(part)
    file = arena_file(folder, plan.key, content)
    os.replace(part, file)
    angles = angle_field(basis, plan.layout)
    made = {
        "form": basis.form,
        "angles": None if angles is None else angles.to_dict(),
        "factors": ranks,
        "content": content,
    }
    write_sheet({**plan.sheet, **made}, sheet_file(folder, plan.key))
    return file


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


def _ranks_of_factors(plan: _Plan, basis: Basis, threads: int) -> dict[str, list[int]]:
    """Tensors whose rows are kept as factors: name -> number of terms of each direction."""

    def ranks(spec: TensorSpec) -> tuple[str, list[int]] | None:
        factors = low_rank_factors(basis, spec, plan.family.special.postprocessed)
        if factors is None:
            return None
        return spec.name, [factors.owner.count(k) for k in range(basis.directions)]

    return dict(
        pair for pair in parallel_map(ranks, plan.layout.tensors, threads) if pair is not None
    )


def _write_rows(plan: _Plan, basis: Basis, packing: Packing, part: Path, threads: int) -> None:
    """Stream the tensors to their offsets; what lies between them stays zero (never written)."""
    import torch

    wide = getattr(torch, str(plan.sheet["dtype"]))
    itemsize = plan.dtype.itemsize
    with part.open("wb") as file:
        file.truncate(packing.size * itemsize)

        def work(spec: TensorSpec) -> None:
            tensors = [plan.family.base.read(spec.name), *_stored_rows(basis, packing, spec)]
            offsets = packing.offsets_of(spec)
            for offset, tensor in zip(offsets, tensors, strict=bool(spec.size)):
                data = tensor.to(wide).contiguous().reshape(-1).numpy().data
                write_at(file.fileno(), offset * itemsize, data)

        for _ in parallel_map(work, plan.layout.tensors, threads):
            pass
        os.fsync(file.fileno())


def _stored_rows(basis: Basis, packing: Packing, spec: TensorSpec) -> list[torch.Tensor]:
    """A tensor's rows as they are stored: all of them, or their two factors."""
    if spec.name not in packing.ranks:
        return basis.rows(spec.name)
    factors = None if basis.factors is None else basis.factors(spec.name)
    assert factors is not None
    return [factors.left, factors.right]
