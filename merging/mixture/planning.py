"""From a recipe of one model to what each of its blocks becomes; no weight is written yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.foreign.shown import shown
from mergesearch.merging.mixture.counting import counted_statistics
from mergesearch.merging.mixture.grouping import (
    Group,
    Slot,
    counts_by_usage,
    slots_of,
)
from mergesearch.merging.mixture.layers import MoeLayer, moe_layers
from mergesearch.merging.mixture.operators import MixtureOptions
from mergesearch.merging.mixture.recipe import MixtureRecipe
from mergesearch.merging.mixture.statistics import LayerStatistics
from mergesearch.merging.mixture.weights import shares, shifted
from mergesearch.merging.tensors.memo import Memo


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What becomes of the experts of one block.

    Attributes:
        layer: The block.
        statistics: What its router does.
        groups: Experts that become one.
        slots: The experts that are stored.
        added: What is added to the share of each expert in its group; empty for nothing.
    """

    layer: MoeLayer
    statistics: LayerStatistics
    groups: tuple[Group, ...]
    slots: tuple[Slot, ...]
    added: tuple[float, ...] = ()

    def shares_of(self, group: Group) -> list[float]:
        """Weights of a group's members, which sum to one."""
        by_usage = shares(self.statistics.usage[list(group)])
        if not self.added:
            return by_usage
        return shifted(by_usage, [self.added[index] for index in group])


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """What becomes of a checkpoint.

    Attributes:
        checkpoint: The base.
        blocks: Its blocks that have experts.
        stored: Experts that each of them stores.
    """

    checkpoint: Checkpoint
    blocks: tuple[BlockPlan, ...]
    stored: int


def opened(recipe: MixtureRecipe) -> tuple[Checkpoint, tuple[MoeLayer, ...]]:
    """The base and its mixtures, once the recipe is known to fit them; reads no weight.

    Raises:
        CheckpointError: If the base is no mixture that is known.
        RecipeError: If a block cannot keep so many experts.
    """
    checkpoint = open_checkpoint(recipe.base, recipe.name)
    layers = moe_layers(checkpoint)
    if checkpoint.folder is None:
        raise RecipeError(f"base: expected a folder with config.json, received {recipe.base}")
    check_fit(recipe, layers)
    return checkpoint, layers


def check_fit(recipe: MixtureRecipe, layers: Sequence[MoeLayer]) -> None:
    """Refuse a recipe whose numbers do not fit the blocks.

    Raises:
        RecipeError: In one line.
    """
    given = recipe.options.experts
    counts = given if isinstance(given, list) else [given]
    if isinstance(given, list) and len(given) != len(layers):
        raise RecipeError(
            f"hyperparameters.experts: expected a number for each of {len(layers)} blocks, "
            f"received {len(given)}"
        )
    most = layers[0].experts
    odd = next((count for count in counts if count > most), None)
    if odd is not None:
        raise RecipeError(
            f"hyperparameters.experts: expected at most {most}, as many as a block has, received "
            f"{odd}"
        )
    if recipe.operator.drops and len(set(counts)) > 1:
        raise RecipeError(
            f"hyperparameters.experts: expected the same number in every block for operator "
            f"{recipe.operator.name}, as the configuration has one for all, received "
            f"{', '.join(map(str, counts))}"
        )
    _check_weights(recipe, layers)


def _check_weights(recipe: MixtureRecipe, layers: Sequence[MoeLayer]) -> None:
    """Refuse weights that are not one for each expert of each block."""
    weights = getattr(recipe.options, "weights", None)
    if weights is None:
        return
    wanted = [layer.experts for layer in layers]
    given = [len(row) for row in weights]
    if given != wanted:
        raise RecipeError(
            f"hyperparameters.weights: expected {len(wanted)} lists of {wanted[0]} numbers, one "
            f"for each expert of each block, received {len(given)} of {shown(given)}"
        )


def plan_mixture(recipe: MixtureRecipe, memo: Memo | None = None) -> MixturePlan:
    """Run the model on the calibration's items, and form groups.

    Args:
        recipe: What is done to which model.
        memo: Where statistics are that were counted before, or None.

    Raises:
        CheckpointError: If the base is no mixture that is known.
        RecipeError: If a block cannot keep so many experts.
        InputError: If model or items cannot be loaded.
    """
    checkpoint, layers = opened(recipe)
    statistics = counted_statistics(recipe, checkpoint, layers, memo)
    return grouped(recipe, checkpoint, layers, statistics)


def grouped(
    recipe: MixtureRecipe,
    checkpoint: Checkpoint,
    layers: Sequence[MoeLayer],
    statistics: Sequence[LayerStatistics],
) -> MixturePlan:
    """Form the groups of all blocks from what their routers do.

    Args:
        recipe: What is done to the model; :func:`opened` has checked it.
        checkpoint: The model.
        layers: Its blocks that have experts.
        statistics: Of each of them.
    """
    options = recipe.options
    counts = _counts(options, statistics)
    stored = layers[0].experts if options.router == "all" else max(counts)
    mean = options.router == "mean"
    weights = getattr(options, "weights", None) or [[]] * len(layers)
    blocks = []
    for layer, own, count, added in zip(layers, statistics, counts, weights, strict=True):
        groups = recipe.operator.group(own, count)
        slots = slots_of(groups, own.usage, stored, mean=mean)
        blocks.append(BlockPlan(layer, own, tuple(groups), tuple(slots), tuple(added)))
    return MixturePlan(checkpoint, tuple(blocks), stored)


def _counts(options: MixtureOptions, statistics: Sequence[LayerStatistics]) -> list[int]:
    """Groups of each block."""
    if isinstance(options.experts, list):
        return options.experts
    if options.allocation == "usage":
        return counts_by_usage(statistics, options.experts * len(statistics))
    return [options.experts] * len(statistics)
