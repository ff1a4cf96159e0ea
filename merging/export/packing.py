"""Packs experts of one base together, so that each of them, and every merge, comes back.

- ``masks``: 1 bit a weight and expert beside one summed task vector (Wang 2024, "Localizing task
  information for improved model merging and compression", TALL masks):
  ``m_t = [|τ_t| > λ_t |τ_MTL − τ_t|]``, restored ``θ₀ + m_t ⊙ τ_MTL`` with ``τ_MTL = Σ_k τ_k``.
- ``rank``: task vectors of matrices cut to a rank, all other tensors whole; with ``directions`` the
  factors of all experts are held in a basis (Alipour and Amiri 2025, "Towards reversible model
  merging for low-rank weights"): the r numbers of each row of B and column of A are, over experts,
  a mean and P principal directions. K − 1 directions lose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.pack_files import (
    FORMAT,
    MANIFEST,
    STEM,
    held_bytes,
    held_dtype,
    held_shapes,
)
from mergesearch.merging.checkpoints.packed import restored
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.companions import copy_companions
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.export.pack_forms import held_numbers
from mergesearch.merging.export.rewritten import SHARD_BYTES
from mergesearch.merging.family.preflight import check_family
from mergesearch.merging.family.special_tensors import running_statistics
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import shown

if TYPE_CHECKING:
    import torch

#: λ of masks, the middle of the authors' grid from 0.2 to 0.6.
THRESHOLD = 0.4


@dataclass(frozen=True)
class PackSettings:
    """How experts are packed.

    Attributes:
        rank: Terms of low-rank task vectors; 0 for masks.
        directions: Directions of a basis of the factors; 0 for the factors themselves.
        thresholds: Expert -> λ of its masks, where it is not :data:`THRESHOLD`.
    """

    rank: int = 0
    directions: int = 0
    thresholds: Mapping[str, float] | None = None

    def threshold(self, name: str) -> float:
        """λ of an expert's masks."""
        return (self.thresholds or {}).get(name, THRESHOLD)


@dataclass(frozen=True)
class Packed:
    """A pack, with what it takes and what it loses.

    Attributes:
        folder: Where it is.
        size: Bytes of all files in it.
        weights: Bytes of its weight files.
        base: Bytes of the base's tensors, which the pack needs and does not hold.
        experts: Bytes of the tensors of each expert.
        errors: Expert -> length of what its task vector lost over the task vector's.
        forms: Form -> number of tensors that are held so.
    """

    folder: Path
    size: int
    weights: int
    base: int
    experts: Mapping[str, int]
    errors: Mapping[str, float]
    forms: Mapping[str, int]

    @property
    def share(self) -> float:
        """Bytes of the pack over those of all experts."""
        return self.size / sum(self.experts.values())


def pack_experts(
    base_path: str,
    paths: Mapping[str, str],
    out: Path,
    settings: PackSettings,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Packed:
    """Write a pack; tensors are read, packed and written one at a time.

    Args:
        base_path: The common base.
        paths: Name -> path of each expert.
        out: Folder to create; may exist if it is empty.
        settings: How.
        overwrite: Replace a folder that is not empty.
        shard_bytes: Size above which the weights are split over several files.

    Raises:
        CheckpointError: If an expert does not fit the base.
        InputError: If the settings do not fit, or ``out`` cannot be written.
    """
    base = open_checkpoint(base_path, "base")
    experts = [open_checkpoint(path, name) for name, path in paths.items()]
    _check_settings(settings, list(paths))
    check_family(base, experts)
    target = resolved(out)
    check_target(target, [base, *experts], overwrite)
    work = _Work(base, experts, settings, _forms(base, experts, settings))
    try:
        with new_folder(target) as part:
            errors = work.write(part, shard_bytes)
            (part / MANIFEST).write_text(json.dumps(work.manifest(errors), indent=1) + "\n")
            for expert in experts:
                (part / expert.name).mkdir()
                if expert.folder is not None:
                    copy_companions(expert.folder, part / expert.name)
            files = [file for file in part.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            weights = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write, received: {error.strerror or error}"
        ) from error
    counted = [*work.forms.values()]
    forms = {form: counted.count(form) for form in dict.fromkeys(counted)}
    sizes = {expert.name: _size(expert) for expert in experts}
    return Packed(out, size, weights, _size(base), sizes, errors, forms)


@dataclass(frozen=True, eq=False)
class _Work:
    """Base and experts with the form of every tensor.

    Attributes:
        base: The base.
        experts: K experts.
        settings: How they are packed.
        forms: Tensor -> form.
    """

    base: Checkpoint
    experts: Sequence[Checkpoint]
    settings: PackSettings
    forms: Mapping[str, str]

    def write(self, folder: Path, shard_bytes: int) -> dict[str, float]:
        """Write the numbers; expert -> share of its task vector that is lost."""
        infos = lay_out_files(folder, dict(self._infos(folder)), shard_bytes, STEM)
        lost = [0.0] * len(self.experts)
        whole = [0.0] * len(self.experts)
        for name, form in self.forms.items():
            if form == "base":
                continue
            held = self._held(name, form, infos)
            for key, tensor in held.items():
                write_tensor(infos[f"{key}/{name}"], tensor)
            origin = self.base.read(name)
            for place, expert in enumerate(self.experts):
                wanted = expert.read(name).double()
                given = restored(form, origin, held, place).to(
                    getattr(_torch(), self._dtype(expert, name))
                )
                lost[place] += float((given.double() - wanted).square().sum())
                whole[place] += float((wanted - origin.double()).square().sum())
        return {
            expert.name: math.sqrt(lost[k] / whole[k]) if whole[k] > 0 else 0.0
            for k, expert in enumerate(self.experts)
        }

    def manifest(self, errors: Mapping[str, float]) -> dict[str, Any]:
        """What is written beside the numbers."""
        masked = not self.settings.rank
        experts = [
            {
                "name": expert.name,
                "path": _absolute(expert),
                "fingerprint": expert.fingerprint(),
                "error": errors[expert.name],
                "dtypes": {
                    name: self._dtype(expert, name)
                    for name in self.forms
                    if self._dtype(expert, name) != self.base.tensors[name].dtype
                },
                **({"threshold": self.settings.threshold(expert.name)} if masked else {}),
            }
            for expert in self.experts
        ]
        return {
            "format": FORMAT,
            "base": {"path": _absolute(self.base), "fingerprint": self.base.fingerprint()},
            "rank": self.settings.rank,
            "directions": self.settings.directions,
            "experts": experts,
            "forms": dict(self.forms),
        }

    def _infos(self, folder: Path) -> Iterator[tuple[str, TensorInfo]]:
        for name, form in self.forms.items():
            shapes = self._shapes(name, form)
            for key, shape in shapes.items():
                dtype = held_dtype(key, self._held_as(name, form))
                size = math.prod(shape) * ITEMSIZE[dtype]
                yield key, TensorInfo(shape, dtype, folder, 0, size)

    def _held(
        self, name: str, form: str, infos: Mapping[str, TensorInfo]
    ) -> dict[str, torch.Tensor]:
        """Numbers of a tensor by kind, in the dtypes in which they are stored."""
        numbers = held_numbers(
            form,
            self.base.read(name),
            [expert.read(name) for expert in self.experts],
            rank=self.settings.rank,
            directions=self.settings.directions,
            thresholds=[self.settings.threshold(expert.name) for expert in self.experts],
        )
        return {
            key: tensor.to(getattr(_torch(), infos[f"{key}/{name}"].dtype))
            for key, tensor in numbers.items()
        }

    def _shapes(self, name: str, form: str) -> dict[str, tuple[int, ...]]:
        settings = self.settings
        shape = self.base.shape(name)
        count = len(self.experts)
        return held_shapes(form, name, shape, count, settings.rank, settings.directions)

    def _held_as(self, name: str, form: str) -> str:
        """The dtype of what is stored: the base's, or for whole tensors one that fits all."""
        if form != "whole":
            return self.base.tensors[name].dtype
        dtypes = {self._dtype(expert, name) for expert in self.experts}
        return max(dtypes, key=lambda dtype: ITEMSIZE[dtype]) if len(dtypes) == 1 else "float32"

    def _dtype(self, expert: Checkpoint, name: str) -> str:
        return (
            expert.tensors[name].dtype if name in expert.tensors else self.base.tensors[name].dtype
        )


def _forms(
    base: Checkpoint, experts: Sequence[Checkpoint], settings: PackSettings
) -> dict[str, str]:
    """How each tensor is held: whole where nothing is smaller, or where it must be exact."""
    exact = {*running_statistics([*base.merged])}
    forms = {}
    for name, info in base.tensors.items():
        if name in base.aliases:
            continue
        if name not in base.merged:
            same = all(_same(base, expert, name) for expert in experts)
            forms[name] = "base" if same else "whole"
            continue
        form = _form(info.shape, settings)
        whole = held_shapes("whole", name, info.shape, len(experts), 0, 0)
        held = held_shapes(form, name, info.shape, len(experts), settings.rank, settings.directions)
        smaller = held_bytes(held, info.dtype) < held_bytes(whole, info.dtype)
        forms[name] = form if smaller and name not in exact and info.shape else "whole"
    return forms


def _form(shape: Sequence[int], settings: PackSettings) -> str:
    if not settings.rank:
        return "masked"
    if len(shape) < 2:
        return "whole"
    return "basis" if settings.directions else "factors"


def _same(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    """Whether an expert has the base's own numbers, or none."""
    if name not in expert.tensors:
        return True
    ours = base.read(name)
    theirs = expert.read(name)
    return ours.dtype == theirs.dtype and bool((ours == theirs).all())


def _check_settings(settings: PackSettings, names: Sequence[str]) -> None:
    odd = next((n for n in names if n in ("", ".", "..") or "/" in n or n.startswith(".")), None)
    if odd is not None:
        raise InputError(f"pack: expected names that can be folders, received {shown(odd)}")
    strange = next((n for n in settings.thresholds or {} if n not in names), None)
    if strange is not None:
        raise InputError(
            f"--threshold: expected names of experts ({', '.join(names)}), received "
            f"{shown(strange)}"
        )
    if settings.directions >= len(names):
        raise InputError(
            f"--directions: expected at most {len(names) - 1}, which lose nothing of "
            f"{len(names)} experts, received {settings.directions}"
        )


def _size(checkpoint: Checkpoint) -> int:
    return sum(info.stop - info.start for info in checkpoint.tensors.values())


def _absolute(checkpoint: Checkpoint) -> str:
    local = Path(checkpoint.path)
    return str(resolved(local)) if local.exists() else checkpoint.path


def _torch() -> Any:
    import torch

    return torch
