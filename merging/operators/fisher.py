"""Fisher merging: weigh every element of every expert by how sharply its answers depend on it.

Matena 2022, "Merging models with Fisher-weighted averaging", Eq. 3: merged = Σ_k w_k F_k ⊙ θ_k /
Σ_j w_j F_j with F_k the diagonal of the Fisher information of expert k on items of its task. In
task vectors, expert k contributes w_k F_k ⊙ τ_k / Σ_j w_j F_j; coefficient 1 is the paper's merge
with w_k = 1.

F is the mean over items of Σ_c p_c (∂ log p_c / ∂θ)², item by item; implementations that sum the
logarithms of a batch before they square have cross terms between items and classes. With many
classes one class is drawn from the model for each item. For models that answer token by token the
answers count as independent, and F is the sum over tokens. ``given`` labels make it the empirical
Fisher information, which is another quantity (Kunstner 2019).

``floor`` is added to every F, so elements on which no answer depends are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import ExpertItems, refuse_calibration
from mergesearch.merging.models.expert_runner import ExpertRunner, answers
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.inner_products import norm
from mergesearch.merging.operators.parts.masks import uniform_bits
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.memo import Tensors
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Which classes are differentiated.
Labels = Literal["exact", "sampled", "given"]

#: Up to this many classes the expectation over them is worked out exactly.
EXACT_CLASSES = 10


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    calibration: ExpertItems,
    labels: Annotated[
        Labels,
        Field(
            description="Classes to differentiate: all (one answer per item and up to 10 classes, "
            "else as sampled), one drawn from the model, or the label of the item."
        ),
    ] = "exact",
    floor: Annotated[float, Field(gt=0, description="Added to every Fisher information.")] = 1e-6,
    normalise: Annotated[
        bool, Field(description="Scale each expert's to norm 1 over the whole model.")
    ] = False,
    seed: Annotated[int, Field(ge=0, description="Seed of the draws of classes.")] = 0,
) -> Basis:
    """Task vectors weighted by Fisher information.

    While items are run, memory holds the model, one expert's Fisher information and one gradient;
    without a memo, the Fisher information of all experts.
    """
    runner = ExpertRunner(calibration, base, experts, own_heads=True)
    information = [
        memoised_per_tensor(
            (base, expert),
            runner.key(["fisher", labels, seed], [expert.name]),
            partial(_information, runner, expert, labels, seed),
        )
        for expert in experts
    ]

    scales = [_scale(one, base, floor) if normalise else 1.0 for one in information]

    def rows(name: str) -> list[torch.Tensor]:
        deltas = task_vectors(base, experts, name)
        fishers = [_floored(one, name, base, floor).to(deltas[0].device) for one in information]
        # Eq. 3: w_k F_k ⊙ τ_k / Σ_j w_j F_j
        weights = [fisher * scale for fisher, scale in zip(fishers, scales, strict=True)]
        total = sum(weights[1:], weights[0])
        return [delta.mul_(weight / total) for delta, weight in zip(deltas, weights, strict=True)]

    return Basis("delta", len(experts), rows)


def _scale(information: Callable[[str], Tensors], base: TensorSource, floor: float) -> float:
    """``1 / ‖F + floor‖`` over the whole model; the floor keeps the norm above 0."""
    return 1 / math.sqrt(
        sum(norm(_floored(information, name, base, floor)) ** 2 for name in base.names)
    )


def _floored(
    information: Callable[[str], Tensors], name: str, base: TensorSource, floor: float
) -> torch.Tensor:
    """F + floor of one tensor; buffers and empty tensors have no Fisher information."""
    import torch

    fisher = information(name).get("fisher")
    return torch.full(tuple(base.shape(name)), floor) if fisher is None else fisher + floor


def _information(runner: ExpertRunner, expert: TensorSource, labels: Labels, seed: int) -> Pieces:
    """Fisher information of all parameters of one expert."""
    import torch

    runner.load_all(expert)
    parameters = {
        name: runner.tensors[name] for name in {view.parameter for view in runner.views.values()}
    }
    parameters = {
        name: tensor
        for name, tensor in parameters.items()
        if isinstance(tensor, torch.nn.Parameter)
    }
    totals = {
        name: torch.zeros_like(
            tensor, dtype=torch.promote_types(tensor.dtype, torch.float32), requires_grad=False
        )
        for name, tensor in parameters.items()
    }
    count = 0
    for items in runner.items(expert.name):
        for item in items.one_by_one():
            for weight, log_likelihood in _log_likelihoods(runner, item, labels, seed, count):
                _add_squares(totals, parameters, weight, log_likelihood)
            count += 1
    for name, view in runner.views.items():
        if view.parameter in totals:
            yield (
                name,
                {"fisher": _checked(view.of(totals[view.parameter]) / count, name, expert).cpu()},
            )


def _log_likelihoods(
    runner: ExpertRunner, item: Items, labels: Labels, seed: int, number: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """Weights and log-likelihoods whose squared gradients add up to the item's share of F.

    These are (p_c, log p_c) of every class, or 1 and the sum over the drawn or given classes.
    """
    log_p = answers(runner.run(item), item.inputs).log_softmax(dim=1)
    if labels == "exact" and len(log_p) == 1 and log_p.shape[1] <= EXACT_CLASSES:
        yield from zip(log_p[0].detach().exp().tolist(), log_p[0], strict=True)
        return
    chosen = _given(item, log_p) if labels == "given" else _drawn(log_p, seed, number)
    yield 1.0, log_p.gather(1, chosen[:, None]).sum()


def _drawn(log_p: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """A class for each answer ``(answers,)``, drawn from the model, whatever the batches are."""
    import torch

    bits = uniform_bits(seed, "labels", f"item {number}", 0, len(log_p)).astype("float64")
    uniform = torch.from_numpy((bits + 0.5) / 2.0**32).to(log_p.device)
    chosen = torch.searchsorted(
        log_p.detach().double().exp().cumsum(dim=1), uniform[:, None]
    ).squeeze(1)
    return chosen.clamp(max=log_p.shape[1] - 1)  # the sum may end below 1


def _given(item: Items, log_p: torch.Tensor) -> torch.Tensor:
    """The label of the item as class numbers ``(answers,)``."""
    if item.labels is None or item.labels.shape != (len(log_p),):
        received = (
            "none"
            if item.labels is None
            else f"shape {list(item.labels.shape[1:])} for {len(log_p)} answers"
        )
        raise InputError(
            "operator fisher: labels 'given': expected a class number per item, received "
            f"{received}"
        )
    return item.labels.to(log_p.device)


def _add_squares(
    totals: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    weight: float,
    log_likelihood: torch.Tensor,
) -> None:
    """Add ``p_c (∂ log p_c / ∂θ)²`` to the totals."""
    import torch

    gradients = torch.autograd.grad(
        log_likelihood, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            totals[name].addcmul_(
                gradient.to(totals[name].dtype), gradient.to(totals[name].dtype), value=weight
            )


def _checked(information: torch.Tensor, name: str, expert: TensorSource) -> torch.Tensor:
    if not bool(information.isfinite().all()):
        raise CheckpointError(
            f"expert {expert.name!r}: expected finite gradients of tensor {name!r} on the "
            "calibration items, received NaN or infinity; check the expert and the items"
        )
    return information


def _refuse(layout: Layout, experts: int, options: Options) -> str | None:
    calibration = options["calibration"]
    label = calibration["label"] if isinstance(calibration, dict) else calibration.label
    if options["labels"] == "given" and label is None:
        return (
            "labels 'given': expected calibration.label to name the column of class numbers, "
            "received none"
        )
    return refuse_calibration(layout, experts, options)


FISHER = Operator(
    name="fisher",
    prepare=prepare,
    summary="element by element, experts weighted by their Fisher information",
    paper="Matena 2022, Merging models with Fisher-weighted averaging",
    family="data",
    scope="G",
    identities=frozenset(
        {"base_at_zero", "single_expert", "identical_experts", "permutation", "linearity"}
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    needs=frozenset({"inputs"}),
    refuse=_refuse,
    copies=lambda experts: 2 * experts + 4,
    stochastic=True,
    when="with a few items of every task, where single elements matter more than directions",
)
