"""A folder that transformers loads, with fewer experts, from a recipe of one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import yaml

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.errors import CheckpointError, InputError, NonFiniteError
from mergesearch.merging.export.companions import copy_companions
from mergesearch.merging.export.folder import checked_fingerprint
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.kernels.host import all_finite
from mergesearch.merging.mixture.card import mixture_card
from mergesearch.merging.mixture.counting import identity
from mergesearch.merging.mixture.layers import smaller_config, smaller_tensors, used_count
from mergesearch.merging.mixture.merging import member_block, merged_block
from mergesearch.merging.mixture.notes import notes_of
from mergesearch.merging.mixture.orders import NeuronOrders
from mergesearch.merging.mixture.planning import BlockPlan, MixturePlan, plan_mixture
from mergesearch.merging.mixture.recipe import MixtureRecipe
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch

#: A block's plan -> name -> tensor.
BlockTensors = Callable[[BlockPlan], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True, eq=False)
class Shrunken:
    """A mixture that was made smaller.

    Attributes:
        folder: The model.
        members: Folders of models that hold one member of each group; none if not asked for.
        plan: What became of its blocks.
        before: Bytes of the base's tensors.
        after: Bytes of the new ones.
        notes: What there is to know beside, one line each.
    """

    folder: Path
    members: tuple[Path, ...]
    plan: MixturePlan
    before: int
    after: int
    notes: tuple[str, ...]


def shrink_mixture(
    recipe: MixtureRecipe,
    out: Path,
    *,
    members: Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    memo: Memo | None = None,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Shrunken:
    """Write a mixture with fewer experts, of the same kind, with its recipe and a model card.

    Blocks are merged one at a time; the folder appears under its name only when it is whole.

    Args:
        recipe: What is done to which model.
        out: Folder to create; may exist if it is empty.
        members: Folder for models of the same shape in which each group's place is taken by one of
            its members: experts for a study that searches the weights of groups.
        overwrite: Replace folders that are not empty.
        shard_bytes: Size above which the weights are split over several files.
        memo: Where statistics and orders of neurons are that were found before, or None.
        facts: Lines for the model card, for example scores.

    Raises:
        CheckpointError: If the base is no mixture that is known, or changed since the recipe.
        RecipeError: If the recipe does not fit it.
        InputError: If model or items cannot be loaded, or ``out`` cannot be written.
        NonFiniteError: If a merged tensor holds NaN or infinity.
    """
    source = open_checkpoint(recipe.base, recipe.name)
    targets = [out, *([] if members is None else [members])]
    for target in targets:
        check_target(resolved(target), (source,), overwrite)
    plan = plan_mixture(recipe, memo)
    stamped = _stamped(recipe, plan.checkpoint)
    notes = notes_of(plan, recipe.operator, recipe.options)
    operator = recipe.operator
    options = recipe.options
    orders = NeuronOrders(identity(recipe, plan.checkpoint), memo)

    def merged(block: BlockPlan) -> Mapping[str, torch.Tensor]:
        return merged_block(plan.checkpoint, block, operator, options, orders)

    told = (*notes, *(f"{key}: {value}" for key, value in facts.items()))
    try:
        after = _put(plan, stamped, merged, told, out, shard_bytes)
        folders = _put_members(plan, stamped, members, orders, shard_bytes)
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write a model, received: {error.strerror or error}"
        ) from error
    return Shrunken(out, folders, plan, bytes_of(plan.checkpoint.tensors), after, notes)


def _put_members(
    plan: MixturePlan,
    recipe: MixtureRecipe,
    members: Path | None,
    orders: NeuronOrders,
    shard_bytes: int,
) -> tuple[Path, ...]:
    """Write the members of groups, as many models as the largest group has members."""
    if members is None:
        return ()
    largest = max(len(group) for block in plan.blocks for group in block.groups)
    folders = []
    for number in range(largest if largest > 1 else 0):

        def tensors(block: BlockPlan, number: int = number) -> Mapping[str, torch.Tensor]:
            operator = recipe.operator
            return member_block(plan.checkpoint, block, operator, recipe.options, orders, number)

        note = f"Holds member {number} of each group in the place of the merge."
        folder = members / f"member-{number}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        _put(plan, recipe, tensors, (note,), folder, shard_bytes)
        folders.append(folder)
    for folder in members.glob("member-*"):  # of an earlier merge that was replaced
        if folder not in folders:
            shutil.rmtree(folder)
    return tuple(folders)


def _stamped(recipe: MixtureRecipe, checkpoint: Checkpoint) -> MixtureRecipe:
    where = f"base ({recipe.base})"
    return replace(recipe, fingerprint=checked_fingerprint(checkpoint, recipe.fingerprint, where))


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors."""
    return sum(info.stop - info.start for info in tensors.values())


def _put(
    plan: MixturePlan,
    recipe: MixtureRecipe,
    tensors: BlockTensors,
    notes: tuple[str, ...],
    out: Path,
    shard_bytes: int,
) -> int:
    """Write one model beside ``out`` and put it there; returns the bytes of its tensors."""
    with new_folder(resolved(out)) as part:
        infos = smaller_tensors(
            plan.checkpoint, [block.layer for block in plan.blocks], plan.stored
        )
        placed = lay_out_files(part, infos, shard_bytes)
        _write_tensors(plan, placed, tensors)
        _write_companions(plan, part)
        _write_recipe(recipe, part)
        card = mixture_card(recipe, plan, notes)
        (part / "README.md").write_text(card, encoding="utf-8")
        _verify(part, infos)
    return bytes_of(infos)


def _write_tensors(
    plan: MixturePlan, placed: Mapping[str, TensorInfo], tensors: BlockTensors
) -> None:
    done = set()
    for block in plan.blocks:
        for name, tensor in tensors(block).items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise NonFiniteError(f"merged tensor {name!r}")
            write_tensor(placed[name], tensor)
            done.add(name)
    for name in placed.keys() - done:
        write_tensor(placed[name], plan.checkpoint.read(name))


def _write_companions(plan: MixturePlan, part: Path) -> None:
    """Copy what lies beside the weights; the configuration gets the new number of experts."""
    folder = plan.checkpoint.folder
    assert folder is not None  # refused when the recipe was opened
    copy_companions(folder, part)
    used = used_count(plan.checkpoint)
    config = dict(plan.checkpoint.config)
    if plan.stored != plan.blocks[0].layer.experts:
        config = smaller_config(config, plan.stored, used)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_recipe(recipe: MixtureRecipe, part: Path) -> None:
    if isinstance(recipe.options.calibration, Calibration):
        return  # a model in memory has no recipe on disk
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, default_flow_style=None, width=120)
    (part / "recipe.yaml").write_text(text, encoding="utf-8")


def _verify(part: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Check a folder by opening it as any reader would."""
    written = open_checkpoint(str(part))
    if {n: (i.shape, i.dtype) for n, i in written.tensors.items()} != {
        n: (i.shape, i.dtype) for n, i in infos.items()
    }:
        raise CheckpointError(f"{part}: expected the planned tensors, received others")
