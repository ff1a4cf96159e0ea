"""RegMean: merge linear layers by regression on the inputs that the experts see.

Jin 2023, "Dataless knowledge fusion by merging weights of language models", Eq. 3: for every linear
layer W = (Σ_k W_k G_k)(Σ_k G_k)⁻¹ with G_k the mean of x xᵀ over the inputs x of expert k, its
off-diagonal elements times ``reduce``; every other tensor is the mean. In task vectors, expert k
contributes τ_k G_k (Σ_j G_j)⁻¹; coefficient 1 is the paper's merge.

Other implementations invert Σ_k G_k. Here it is factored in fp64, with a small ridge shared equally
by the experts, so that equal Gram matrices give the mean exactly, and inputs that no item reaches
are averaged. Tokens that the attention mask calls padding do not count.

The experts of a mixture are a linear layer each, whether they are stored apart or as a stack: their
inputs are the tokens that are routed to them, among which padding is not told apart. An expert that
gets none is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from mergesearch.merging.models.calibration_spec import ExpertItems, refuse_calibration
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.gram import Reduce, linear_weights, regressed
from mergesearch.merging.operators.parts.stack_gram import (
    collected_grams,
    may_have_stacks,
    regressed_members,
    stack_weights,
)
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    calibration: ExpertItems,
    reduce: Reduce = 0.95,
) -> Basis:
    """Task vectors reweighted by the inputs of each expert.

    While items are run, memory holds the model and the Gram matrices of one expert; without a memo,
    those of all experts.
    """
    runner = ExpertRunner(calibration, base, experts)
    # Without `reduce` in the key: its values share the Gram matrices. Those of stacks came later.
    what = ["gram", *(["stacks"] if may_have_stacks(base) else [])]
    grams = [
        memoised_per_tensor(
            (base, expert), runner.key(what, [expert.name]), partial(_grams, runner, expert)
        )
        for expert in experts
    ]

    def rows(name: str) -> list[torch.Tensor]:
        deltas = task_vectors(base, experts, name)
        axes = len(base.shape(name))
        if axes not in (2, 3):
            return [delta / len(deltas) for delta in deltas]
        # Eq. 3: τ_k G_k (Σ_j G_j)⁻¹
        solve = regressed if axes == 2 else regressed_members
        return solve(deltas, [gram(name) for gram in grams], reduce, place_of(base))

    return Basis("delta", len(experts), rows)


def _grams(runner: ExpertRunner, expert: TensorSource) -> Pieces:
    """Gram matrices of all linear layers of one expert, and of its stacks of matrices."""
    weights = linear_weights(runner.model, runner.views)
    stacks = stack_weights(runner.model, runner.views)
    runner.load_all(expert)
    runs = ((items.inputs, partial(runner.run, items)) for items in runner.items(expert.name))
    yield from collected_grams(runner, weights, stacks, runs)


REGMEAN = Operator(
    name="regmean",
    prepare=prepare,
    summary="linear layers by regression on each expert's inputs, the mean elsewhere",
    paper="Jin 2023, Dataless knowledge fusion by merging weights of language models",
    family="data",
    scope="S",
    identities=frozenset(
        {"base_at_zero", "single_expert", "identical_experts", "permutation", "linearity"}
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    needs=frozenset({"inputs"}),
    refuse=refuse_calibration,
    # The Gram matrices of a layer, up to four times its weight, and the solve in fp64.
    copies=lambda experts: 6 * experts + 32,
    when="with unlabelled items of every task: strong wherever linear layers do the work",
)
