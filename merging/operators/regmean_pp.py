"""RegMean++: RegMean whose inputs pass through the blocks that are already merged.

Nguyen 2025, "RegMean++: enhancing effectiveness and generalization of regression mean for model
merging": the inputs of block l of every expert come from merged blocks 0 to l − 1, as they will in
the merged model, not from the expert's own. Embeddings are averaged first; then, block by block,
the Gram matrices of all experts are collected, the linear layers solved as in RegMean, and the
items passed on. As in the authors' code, everything outside the blocks is the mean, heads included,
as is a tower that the calibration items do not pass through.

The stream is that of coefficient 1: other coefficients scale these same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.models.blocks import Call, Chain, chains_in_order, check_same, passage
from mergesearch.merging.models.calibration_spec import ExpertItems, refuse_calibration
from mergesearch.merging.models.expert_runner import ExpertRunner, Items
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.gram import (
    Grams,
    LinearWeight,
    Reduce,
    linear_weights,
    regressed,
)
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
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

    Holds the model, the hidden states of all items of all experts and the Gram matrices of one
    block while items are run; without a memo, also the rows of all linear layers.
    """
    bench = ExpertRunner(calibration, base)
    names = [expert.name for expert in experts]
    found = memoised_per_tensor(
        (base, *experts),
        bench.key(["regmean_pp", reduce], names),
        partial(_regressions, bench, experts, reduce),
    )

    def rows(name: str) -> list[torch.Tensor]:
        kept = found(name)
        if kept:
            device = base.read(name).device
            return [kept[str(place)].to(device, copy=True) for place in range(len(experts))]
        return _mean_rows(base, experts, name)

    return Basis("delta", len(experts), rows)


def _mean_rows(
    base: TensorSource, experts: Sequence[TensorSource], name: str
) -> list[torch.Tensor]:
    return [delta.div_(len(experts)) for delta in task_vectors(base, experts, name)]


@dataclass(frozen=True, eq=False)
class _Flow:
    """A batch in front of a block.

    Attributes:
        items: The batch.
        calls: How the model calls this block and those behind it.
        hidden: The hidden state.
    """

    items: Items
    calls: tuple[Call, ...]
    hidden: torch.Tensor


def _regressions(bench: ExpertRunner, experts: Sequence[TensorSource], reduce: float) -> Pieces:
    """Rows of every linear layer in a block, chain by chain and block by block; the model ends up
    merged.
    """
    for name in bench.places:
        _put_merged(bench, name, _mean_rows(bench.base, experts, name))
    first = bench.items(experts[0].name)[0]
    for chain in chains_in_order(bench.model, partial(_run, bench, first)):
        flows = [
            [_captured(bench, chain, items) for items in bench.items(expert.name)]
            for expert in experts
        ]
        for block in chain.blocks:
            yield from _merge_block(bench, experts, reduce, block, flows)
            flows = [[_passed(bench, flow, block) for flow in own] for own in flows]
        check_same(
            chain, passage(bench.model, chain, partial(_run, bench, first)).exit, flows[0][0].hidden
        )


def _run(bench: ExpertRunner, items: Items) -> Any:
    import torch

    with torch.no_grad():
        return bench.run(items)


def _captured(bench: ExpertRunner, chain: Chain, items: Items) -> _Flow:
    captured = passage(bench.model, chain, partial(_run, bench, items))
    return _Flow(items, captured.calls, captured.entry)


def _passed(bench: ExpertRunner, flow: _Flow, block: str) -> _Flow:
    """The batch behind the block, as the model now has it."""
    hidden = flow.calls[0].repeat(bench.model.get_submodule(block), flow.hidden)
    return _Flow(flow.items, flow.calls[1:], hidden)


def _merge_block(
    bench: ExpertRunner,
    experts: Sequence[TensorSource],
    reduce: float,
    block: str,
    flows: Sequence[Sequence[_Flow]],
) -> Pieces:
    """Rows of the linear layers of one block, whose merge is then in the model."""
    names = [
        name for name, place in bench.places.items() if place.parameter.startswith(f"{block}.")
    ]
    weights = linear_weights(bench.model, {name: bench.places[name] for name in names})
    grams = []
    for expert, own in zip(experts, flows, strict=True):
        bench.load_all(expert, names)
        grams.append(_grams(bench, block, weights, own))
    for name in names:
        rows = _mean_rows(bench.base, experts, name)
        if name in weights:
            deltas = task_vectors(bench.base, experts, name)
            rows = regressed(deltas, [own.mean(weights[name]) for own in grams], reduce)
            yield name, {str(place): row.cpu() for place, row in enumerate(rows)}
        _put_merged(bench, name, rows)


def _grams(
    bench: ExpertRunner, block: str, weights: Mapping[str, LinearWeight], flows: Sequence[_Flow]
) -> Grams:
    """Gram matrices of one block, as the model now has it."""
    layers = {
        weight.module: bench.model.get_submodule(weight.module) for weight in weights.values()
    }
    collected = Grams()
    for flow in flows:
        with collected.collecting(layers, flow.items.inputs):
            _passed(bench, flow, block)
    return collected


def _put_merged(bench: ExpertRunner, name: str, rows: Sequence[torch.Tensor]) -> None:
    bench.load_one(name, sum(rows, bench.base.read(name).to(rows[0].dtype)))


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
)
