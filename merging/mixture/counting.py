"""What the routers of a mixture do, counted once for all merges of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.mixture.layers import MoeLayer
from mergesearch.merging.mixture.recipe import MixtureRecipe
from mergesearch.merging.mixture.statistics import LayerStatistics, measure_layers
from mergesearch.merging.models.calibration_items import Items, items_of, read_items
from mergesearch.merging.models.calibration_spec import Calibration, file_versions
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch

#: Changes whenever the same model and items give other statistics than before.
REVISION = 1


def counted_statistics(
    recipe: MixtureRecipe,
    checkpoint: Checkpoint,
    layers: Sequence[MoeLayer],
    memo: Memo | None = None,
) -> list[LayerStatistics]:
    """Statistics of all blocks, from a memo if they were counted before.

    Args:
        recipe: Whose calibration and operator say what is counted.
        checkpoint: The model.
        layers: Its blocks that have experts.
        memo: Where statistics are kept, or None.

    Raises:
        InputError: If model or items cannot be loaded.
        RecipeError: If items in memory are those of several models.
    """
    calibration = recipe.options.calibration
    if memo is None or isinstance(calibration, Calibration):
        return _counted(recipe, layers)
    key = [
        "statistics of a mixture",
        REVISION,
        *identity(recipe, checkpoint),
        calibration,
        file_versions({"calibration": calibration}),
        recipe.operator.by_outputs,
    ]
    tensors = memo.get(key, lambda: _as_tensors(_counted(recipe, layers)))
    return [_of_tensors(tensors, index) for index in range(len(layers))]


def identity(recipe: MixtureRecipe, checkpoint: Checkpoint) -> list[Any]:
    """What tells the weights from others: their content if it is known, else files and times."""
    if recipe.fingerprint:
        return [recipe.fingerprint]
    states = [(file, file.stat()) for file in checkpoint.files]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _counted(recipe: MixtureRecipe, layers: Sequence[MoeLayer]) -> list[LayerStatistics]:
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


def _as_tensors(statistics: Sequence[LayerStatistics]) -> dict[str, torch.Tensor]:
    import torch

    tensors = {}
    for index, own in enumerate(statistics):
        tensors[f"usage.{index}"] = torch.from_numpy(own.usage)
        tensors[f"logits.{index}"] = torch.from_numpy(own.logits)
        tensors[f"outputs.{index}"] = torch.from_numpy(own.outputs)
        tensors[f"tokens.{index}"] = torch.tensor([own.tokens])
    return tensors


def _of_tensors(tensors: Mapping[str, torch.Tensor], index: int) -> LayerStatistics:
    return LayerStatistics(
        tensors[f"usage.{index}"].numpy(),
        tensors[f"logits.{index}"].numpy(),
        tensors[f"outputs.{index}"].numpy(),
        int(tensors[f"tokens.{index}"][0]),
    )
