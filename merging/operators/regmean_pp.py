"""RegMean++: RegMean whose inputs pass through the blocks that are already merged.

Nguyen 2025, "RegMean++: enhancing effectiveness and generalization of regression mean for model
merging": the inputs of block l of every expert come from merged blocks 0 to l − 1, as they will in
the merged model, not from the expert's own. Embeddings are averaged first. Then, for every block:

1. Run the block with each expert's weights and collect the Gram matrices G_k of its linear layers.
2. Solve W = (Σ_k W_k G_k)(Σ_k G_k)⁻¹ as in RegMean; the other parameters are the mean.
3. Pass the items on through the merged block.

As in the authors' code, everything outside the blocks is the mean, heads included, as is a tower
that the calibration items do not pass through.

Inputs are those of the merge at coefficient 1; other coefficients scale these same rows. The
experts of a mixture are linear layers, as in RegMean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.models.blocks import Call, Chain, chains_in_order, check_same, passage
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import ExpertItems, refuse_calibration
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.gram import (
    LinearWeight,
    Reduce,
    linear_weights,
    regressed,
)
from mergesearch.merging.operators.parts.stack_gram import (
    StackWeight,
    collected_grams,
    may_have_stacks,
    regressed_members,
    stack_weights,
)
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.memo import Tensors
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.roles import classify
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    calibration: ExpertItems,
    reduce: Reduce = 0.95,
) -> Basis:
    """Task vectors reweighted by the inputs of each expert in the merged model.

    While items are run, memory holds the model, the hidden states of all items of all experts and
    the Gram matrices of one block; without a memo, also the rows of all linear layers.
    """
    runner = ExpertRunner(calibration, base, experts)
    names = [expert.name for expert in experts]
    regressions = memoised_per_tensor(
        (base, *experts),
        runner.key(["regmean_pp", reduce, *(["stacks"] if may_have_stacks(base) else [])], names),
        partial(_regressions, runner, experts, reduce),
    )

    def rows(name: str) -> list[torch.Tensor]:
        solved = regressions(name)
        if solved:
            device = base.read(name).device
            return [solved[str(k)].to(device, copy=True) for k in range(len(experts))]
        return _mean_rows(base, experts, name)

    return Basis("delta", len(experts), rows)


def _mean_rows(
    base: TensorSource, experts: Sequence[TensorSource], name: str
) -> list[torch.Tensor]:
    return [delta.div_(len(experts)) for delta in task_vectors(base, experts, name)]


@dataclass(frozen=True, eq=False)
class _BatchAtBlock:
    """A batch whose hidden states are the input of a block.

    Attributes:
        items: The batch.
        calls: How the model calls this block and those behind it.
        hidden: The hidden state.
    """

    items: Items
    calls: tuple[Call, ...]
    hidden: torch.Tensor


def _regressions(runner: ExpertRunner, experts: Sequence[TensorSource], reduce: float) -> Pieces:
    """Rows of every linear layer in a block; the model ends up merged."""
    for name in runner.views:
        _load_merged(runner, name, _mean_rows(runner.base, experts, name))
    first = runner.items(experts[0].name)[0]
    for chain in chains_in_order(runner.model, partial(_run, runner, first)):
        batches = [
            [_captured(runner, chain, items) for items in runner.items(expert.name)]
            for expert in experts
        ]
        for block in chain.blocks:
            yield from _merge_block(runner, experts, reduce, block, batches)
            batches = [[_passed(runner, batch, block) for batch in own] for own in batches]
        check_same(
            chain,
            passage(runner.model, chain, partial(_run, runner, first)).exit,
            batches[0][0].hidden,
        )


def _run(runner: ExpertRunner, items: Items) -> Any:
    import torch

    with torch.no_grad():
        return runner.run(items)


def _captured(runner: ExpertRunner, chain: Chain, items: Items) -> _BatchAtBlock:
    captured = passage(runner.model, chain, partial(_run, runner, items))
    return _BatchAtBlock(items, captured.calls, captured.entry)


def _passed(runner: ExpertRunner, batch: _BatchAtBlock, block: str) -> _BatchAtBlock:
    """The batch after the block, with the weights that the model now holds."""
    hidden = batch.calls[0].repeat(runner.model.get_submodule(block), batch.hidden)
    return _BatchAtBlock(batch.items, batch.calls[1:], hidden)


def _merge_block(
    runner: ExpertRunner,
    experts: Sequence[TensorSource],
    reduce: float,
    block: str,
    batches: Sequence[Sequence[_BatchAtBlock]],
) -> Pieces:
    """Rows of the linear layers of one block; afterwards the model holds the merged block."""
    names = [name for name, view in runner.views.items() if view.parameter.startswith(f"{block}.")]
    views = {name: runner.views[name] for name in names}
    weights = linear_weights(runner.model, views)
    stacks = stack_weights(runner.model, views)
    grams = []
    for expert, own in zip(experts, batches, strict=True):
        runner.load_all(expert, names)
        grams.append(_grams(runner, block, weights, stacks, own))
    for name in names:
        rows = _mean_rows(runner.base, experts, name)
        if name in weights or name in stacks:
            deltas = task_vectors(runner.base, experts, name)
            means = [own[name] for own in grams]
            solve = regressed_members if deltas[0].ndim == 3 else regressed
            rows = solve(deltas, means, reduce, place_of(runner.base))
            yield name, {str(k): row.cpu() for k, row in enumerate(rows)}
        _load_merged(runner, name, rows)


def _grams(
    runner: ExpertRunner,
    block: str,
    weights: Mapping[str, LinearWeight],
    stacks: Mapping[str, StackWeight],
    batches: Sequence[_BatchAtBlock],
) -> dict[str, Tensors]:
    """Gram matrices of one block by stored name, with the weights that the model now holds."""
    runs = ((batch.items.inputs, partial(_passed, runner, batch, block)) for batch in batches)
    return dict(collected_grams(runner, weights, stacks, runs))


def _load_merged(runner: ExpertRunner, name: str, rows: Sequence[torch.Tensor]) -> None:
    runner.load_one(name, sum(rows, runner.base.read(name).to(rows[0].dtype)))


def _refuse(layout: Layout, experts: int, options: Options) -> str | None:
    if all(classify(name).block is None for name in layout.names):
        return (
            "expected numbered residual blocks among the tensors, such as layers.0.*, found none; "
            "choose operator regmean"
        )
    return refuse_calibration(layout, experts, options)


REGMEAN_PP = Operator(
    name="regmean_pp",
    prepare=prepare,
    summary="RegMean on the inputs that the merged blocks give, block by block",
    paper="Nguyen 2025, RegMean++: enhancing effectiveness and generalization of regression mean "
    "for model merging",
    family="data",
    scope="S",
    identities=frozenset(
        {"base_at_zero", "single_expert", "identical_experts", "permutation", "linearity"}
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    needs=frozenset({"inputs"}),
    refuse=_refuse,
    # The Gram matrices of a block, about twelve times its largest weight each, and the solve in
    # fp64.
    copies=lambda experts: 16 * experts + 32,
    when="as `regmean`, where one more pass over the blocks can be afforded; often the best start",
)
