"""Models out of packs: an expert as a folder of its own, or a merge of a pack's experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.pack_files import Pack, PackedExpert, read_pack
from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.export.rewritten import write_rewritten
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import path_shown, shown, shown_names
from mergesearch.merging.recipe import Recipe, Source


@dataclass(frozen=True)
class RestoredExpert:
    """An expert as it came back.

    Attributes:
        folder: Where it is.
        size: Bytes of its weights.
        expert: What the pack says of it.
        exact: Whether its weights are those that were packed, bit for bit.
    """

    folder: Path
    size: int
    expert: PackedExpert
    exact: bool


def restore_expert(
    folder: Path, name: str, out: Path, *, overwrite: bool = False
) -> RestoredExpert:
    """Write an expert of a pack as a folder that transformers loads.

    Raises:
        CheckpointError: If there is no such pack or expert, or the base is not the pack's.
        InputError: If ``out`` cannot be written.
    """
    pack = read_pack(folder)
    if name not in pack.names:
        raise InputError(
            f"--expert: expected one of {shown_names(pack.names)}, received {shown(name)}"
        )
    packed = open_checkpoint(str(folder / name))
    packed.fingerprint()  # refuses another base than the pack's
    size = write_rewritten(packed, out, packed.read, overwrite=overwrite)
    expert = pack.experts[pack.names.index(name)]
    exact = open_checkpoint(str(out)).fingerprint() == expert.fingerprint
    return RestoredExpert(out, size, expert, exact)


def recipe_from_pack(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe whose experts are read from a pack, by their names.

    Raises:
        CheckpointError: If there is no such pack.
        RecipeError: If it lacks an expert, or has another base.
    """
    pack = read_pack(folder)
    strange = [expert.name for expert in recipe.experts if expert.name not in pack.names]
    if strange:
        raise RecipeError(
            f"recipe: expected experts of the pack ({shown_names(pack.names)}), received "
            f"{shown(strange[0])}"
        )
    _check_base(recipe, pack)
    experts = tuple(
        Source(expert.name, str(resolved(folder / expert.name))) for expert in recipe.experts
    )
    base = Source(recipe.base.name, pack.base, pack.base_fingerprint)
    return replace(recipe, base=base, experts=experts)


def _check_base(recipe: Recipe, pack: Pack) -> None:
    if recipe.base.fingerprint not in ("", pack.base_fingerprint):
        raise RecipeError(
            f"recipe: expected the base of {path_shown(pack.folder)} "
            f"({pack.base_fingerprint[:12]}), received {recipe.base.fingerprint[:12]}"
        )
