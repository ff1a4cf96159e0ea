"""Lower blocks whose merge a trial shares with those before it, and which need not run again.

What :mod:`mergesearch.merging.models.hidden_states` must know is here: which coefficients make the
weights of each block. A merge is a function of its recipe, so blocks with the same coefficients,
bits and basis have the same weights, and what they gave for an item is what they would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from mergesearch.merging import Recipe
from mergesearch.search.workers.messages import Task, WorkerSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.hidden_states.towers import HiddenStates
    from mergesearch.merging.resident.merged_model import MergedModel

#: Weights of each range that are looked at to see that a merge is still in the model.
SAMPLES = 16


@dataclass(frozen=True, eq=False)
class MergedBlock:
    """Where the weights of a block come from.

    Attributes:
        ranges: Flat ``(start, stop)`` ranges, in increasing order.
        tensors: Names of the tensors in them.
    """

    ranges: tuple[tuple[int, int], ...]
    tensors: frozenset[str]

    def digest(self, recipe: Recipe) -> bytes:
        """Identity of its weights among merges of one basis."""
        digest = blake2b(digest_size=16)
        for start, stop in self.ranges:
            part = recipe.field.restrict(start, stop)
            digest.update(part.boundaries.tobytes())
            digest.update(part.values.tobytes())
        bits = sorted((name, bits) for name, bits in recipe.bits if name in self.tensors)
        digest.update(repr(bits).encode())
        return digest.digest()


class LowerBlocks:
    """Lets lower blocks of a resident model run once for all trials that share their merge.

    Args:
        merged: On one device.
        basis: Of the merges that are followed (:attr:`Recipe.basis_key`); for others, everything
            runs.
        limit: Bytes of hidden states at most.
    """

    def __init__(self, merged: MergedModel, basis: str, limit: int) -> None:
        from mergesearch.merging.models.hidden_states.store import HiddenStore
        from mergesearch.merging.models.hidden_states.towers import HiddenStates

        self._basis = basis
        self._weights = merged.merged
        self.store = HiddenStore(limit)
        models = {id(model): model for model in (merged.model, *merged.heads.values())}
        self._models: list[tuple[HiddenStates, dict[str, list[MergedBlock]]]] = []
        for number, model in enumerate(models.values()):
            states = HiddenStates(model, self.store, str(number))
            self._models.append((states, _merged_towers(states, merged)))
        self._places = self._sample_places()
        self._watched = [
            weights
            for states, towers in self._models
            for name in towers
            for block in states.towers[name].blocks
            for weights in (*block.parameters(), *block.buffers())
        ]

    @contextmanager
    def used(self, task: Task) -> Iterator[None]:
        """A context in which a task is evaluated whose merge is in the model.

        What is kept is let go where the task is none of the search.
        """
        recipe = task.recipe
        if task.split != "search" or recipe.routing or recipe.basis_key != self._basis:
            self.store.clear()
            yield
            return
        before = self._seen()
        with ExitStack() as stack:
            for states, towers in self._models:
                digests = {
                    name: [block.digest(recipe) for block in blocks]
                    for name, blocks in towers.items()
                }
                stack.enter_context(states.used(digests, lambda: self._are_present(before)))
            yield

    def _seen(self) -> tuple[list[int], torch.Tensor]:
        """Counts of torch's own writes into the blocks, and weights that others would change."""
        return [each._version for each in self._watched], self._weights[self._places]

    def _are_present(self, before: tuple[list[int], torch.Tensor]) -> bool:
        """Whether the weights are still those of the merge, as far as can be seen at once."""
        import torch

        versions, sample = self._seen()
        return versions == before[0] and torch.equal(sample, before[1])

    def _sample_places(self) -> torch.Tensor:
        """Positions spread over all ranges."""
        import torch

        ranges = [
            range(*each)
            for _, towers in self._models
            for blocks in towers.values()
            for block in blocks
            for each in block.ranges
        ]
        places = [each[:: max(len(each) // SAMPLES, 1)] for each in ranges]
        flat = sorted({place for each in places for place in each})
        return torch.tensor(flat, dtype=torch.int64, device=self._weights.device)


def lower_blocks(spec: WorkerSpec, evaluator: Any, merged: MergedModel) -> LowerBlocks | None:
    """What keeps hidden states of a worker, if the study asks for it and it is possible.

    It is not where the model is merged for each input, lies over several cards, is one mixture, or
    has running statistics that are brought up to date after the merge.
    """
    apart = spec.template.mixture or spec.template.routing or getattr(evaluator, "parameters", ())
    if not spec.hidden_states or apart or spec.shards > 1 or len(merged.shards) > 1:
        return None
    return LowerBlocks(merged, spec.template.basis_key, spec.hidden_states)


def _merged_towers(states: HiddenStates, merged: MergedModel) -> dict[str, list[MergedBlock]]:
    """Tower -> its blocks; without towers whose weights are copies of merged ones."""
    towers = {}
    placed = merged.placed
    for name, tower in states.towers.items():
        blocks = [_merged_block(block, merged, placed) for block in tower.blocks]
        if all(block is not None for block in blocks):
            towers[name] = [block for block in blocks if block is not None]
    return towers


def _merged_block(
    block: nn.Module, merged: MergedModel, placed: frozenset[int]
) -> MergedBlock | None:
    """Where a block's weights come from; those that are not merged stay what they are.

    None where some of them are copies of what is merged.
    """
    memory = merged.merged.untyped_storage().data_ptr()
    ranges = []
    for weights in (*block.parameters(), *block.buffers()):
        if weights.untyped_storage().data_ptr() == memory:
            start = int(weights.storage_offset())
            ranges.append((start, start + int(weights.numel())))
        elif id(weights) in placed:
            return None
    inside = {
        spec.name
        for spec in merged.layout.tensors
        if any(start <= spec.start < stop for start, stop in ranges)
    }
    return MergedBlock(tuple(sorted(ranges)), frozenset(inside))
