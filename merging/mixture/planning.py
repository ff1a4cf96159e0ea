"""From a recipe of one model to what each of its blocks becomes; no weight is written yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.mixture.grouping import (
    Group,
    Slot,
    counts_by_usage,
    slots_of,
)
from mergesearch.merging.mixture.layers import MoeLayer, moe_layers
from mergesearch.merging.mixture.operators import MixtureOptions
from mergesearch.merging.mixture.recipe import MixtureRecipe
from mergesearch.merging.mixture.statistics import LayerStatistics, measure_layers
from mergesearch.merging.models.calibration_items import Items, items_of, read_items
from mergesearch.merging.models.calibration_spec import Calibration


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What becomes of the experts of one block.

    Attributes:
        layer: The block.
        statistics: What its router does.
        groups: Experts that become one.
        slots: The experts that are stored.
    """

    layer: MoeLayer
    statistics: LayerStatistics
    groups: tuple[Group, ...]
    slots: tuple[Slot, ...]


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
    return checkpoint, layers


def plan_mixture(recipe: MixtureRecipe) -> MixturePlan:
    """Run the model on the calibration's items, and form groups.

    Raises:
        CheckpointError: If the base is no mixture that is known.
        RecipeError: If a block cannot keep so many experts.
        InputError: If model or items cannot be loaded.
    """
    checkpoint, layers = opened(recipe)
    statistics = _measured(recipe, checkpoint, layers)
    counts = _counts(recipe.options, statistics)
    whole = recipe.options.router == "all"
    stored = layers[0].experts if whole else max(counts)
    mean = recipe.options.router == "mean"
    blocks = []
    for layer, own, count in zip(layers, statistics, counts, strict=True):
        groups = recipe.operator.group(own, count)
        slots = slots_of(groups, own.usage, stored, mean=mean)
        blocks.append(BlockPlan(layer, own, tuple(groups), tuple(slots)))
    return MixturePlan(checkpoint, tuple(blocks), stored)


def _counts(options: MixtureOptions, statistics: Sequence[LayerStatistics]) -> list[int]:
    """Groups of each block."""
    if isinstance(options.experts, list):
        return options.experts
    if options.allocation == "usage":
        return counts_by_usage(statistics, options.experts)
    return [options.experts] * len(statistics)


def _measured(
    recipe: MixtureRecipe, checkpoint: Checkpoint, layers: Sequence[MoeLayer]
) -> list[LayerStatistics]:
    from mergesearch.merging.models.loading import load_model

    calibration = recipe.options.calibration
    outputs = recipe.operator.by_outputs
    if isinstance(calibration, Calibration):
        if not isinstance(calibration.batches, Sequence):
            raise RecipeError(
                "calibration: expected a list of batches for one model, received a mapping"
            )
        batches: list[Items] = [items_of(batch, calibration.label) for batch in calibration.batches]
        return measure_layers(calibration.model, layers, batches, outputs=outputs)
    batches = read_items(calibration, str(calibration["data"]))
    model = load_model(recipe.base, calibration["model_class"]).to(calibration["device"])
    return measure_layers(model, layers, batches, outputs=outputs)
