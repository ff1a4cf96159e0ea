"""A resident model whose experts become fewer anew for every trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.kernels.dispatch import accumulation_dtype
from mergesearch.merging.mixture.counting import counted_statistics, identity
from mergesearch.merging.mixture.in_recipe import mixture_of
from mergesearch.merging.mixture.merging import merged_block
from mergesearch.merging.mixture.orders import NeuronOrders
from mergesearch.merging.mixture.planning import BlockPlan, check_fit, grouped, opened
from mergesearch.merging.mixture.recipe import MixtureRecipe
from mergesearch.merging.mixture.routers import NarrowRouter
from mergesearch.merging.mixture.statistics import mixture_modules
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.arena_files import locked
from mergesearch.merging.resident.encodings.packing import Packing
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.resident.merged_model import MergedModel


def empty_arenas(family: ModelFamily) -> Arenas:
    """The layout of a base that nothing is added to; its weights are not read through arenas."""
    import numpy as np

    packing = Packing(family.layout, 0, accumulation_dtype(family.layout), {})
    memory = np.zeros(0, np.uint8)
    return Arenas(family.layout, "delta", memory, packing, copied=family.copied)


class MixtureWriter:
    """Writes merges inside one mixture into a resident model of the base's shape.

    Statistics of the routers are counted once for all workers of a host, orders of neurons when
    they are first needed. A trial writes only the blocks that differ from the trial before it.
    Experts that a block no longer has stay where they are, and its router does not see them.
    """

    def __init__(self, template: Recipe, folder: Path) -> None:
        """Open the base and count what its routers do, if this host has not.

        Args:
            template: Of the study; its operator says which statistics are needed.
            folder: Where arenas of this host are kept.

        Raises:
            CheckpointError: If the base is no mixture that is known.
            InputError: If model or items cannot be loaded.
        """
        recipe = mixture_of(template)
        self._checkpoint, self._layers = opened(recipe)
        memo = Memo(folder / "shared")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            self._statistics = counted_statistics(recipe, self._checkpoint, self._layers, memo)
        self._orders = NeuronOrders(identity(recipe, self._checkpoint), memo)
        self._routers: Sequence[NarrowRouter] = ()
        self._written: dict[str, Any] = {}

    def attach(self, merged: MergedModel) -> None:
        """Write the base into a resident model, and take hold of its routers."""
        merged.write_tensors((name, self._checkpoint.read(name)) for name in merged.layout.names)
        modules = mixture_modules(merged.model, self._layers)
        self._routers = [NarrowRouter(module.gate) for _, module in modules]

    def write(self, merged: MergedModel, recipe: Recipe) -> None:
        """Write the merge of a recipe.

        Args:
            merged: The resident model that was attached.
            recipe: Of the study.

        Raises:
            RecipeError: If the recipe does not fit the base.
            NonFiniteError: If a merged tensor holds NaN or infinity.
        """
        mixture = mixture_of(recipe)
        check_fit(mixture, self._layers)
        plan = grouped(mixture, self._checkpoint, self._layers, self._statistics)
        keys = {block.layer.block: _key(block, mixture) for block in plan.blocks}
        changed = [
            b for b in plan.blocks if self._written.get(b.layer.block) != keys[b.layer.block]
        ]
        self._written = {}  # until all are whole
        merged.write_tensors(self._tensors(changed, mixture, merged))
        self._written = keys
        for router in self._routers:
            router.rows = plan.stored

    def _tensors(
        self, blocks: Sequence[BlockPlan], mixture: MixtureRecipe, merged: MergedModel
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of the tensors of some blocks, in the shapes of the base."""
        for block in blocks:
            made = merged_block(
                self._checkpoint, block, mixture.operator, mixture.options, self._orders
            )
            for name, tensor in made.items():
                yield name, _filled(tensor, merged.layout.by_name[name].shape)


def _key(block: BlockPlan, mixture: MixtureRecipe) -> Any:
    """What the tensors of a block follow from, beside the weights of the base."""
    left_out = {"experts", "weights", "allocation", "calibration"}
    options = mixture.options.model_dump(exclude=left_out)
    shares = [block.shares_of(group) for group in block.groups]
    return mixture.operator.name, options, block.groups, block.slots, shares


def _filled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor with rows of zeros behind its own, up to a shape."""
    import torch

    missing = shape[0] - tensor.shape[0]
    if not missing or tensor.shape[1:] != tuple(shape[1:]):
        return tensor
    return torch.cat([tensor, tensor.new_zeros((missing, *shape[1:]))])
