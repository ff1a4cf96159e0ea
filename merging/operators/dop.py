"""DOP: experts join one after another, each weighed against the merge so far in two projections.

Yang 2025, "Continual model merging without data: dual projections for balancing stability and
plasticity". With X the merge, of task vectors, T the merge so far (i = 1) and τ the new expert's
(i = 2), both decomposed as U_i Σ_i V_iᵀ, per matrix:

* L_i(X) = ‖Σ_i U_iᵀ (X − T_i)‖² + ‖(X − T_i) V_i Σ_i‖² (Eq. 2 and 3): how much of what model i
  writes to and reads from is lost, in the spaces of its left and right singular vectors.
* X starts at the mean of both and follows w L_1 + (1 − w) L_2 down by Adam.
* w is chosen at every step (``balance="adaptive"``): the least norm of w ∇L_1/L_1 + (1 − w)
  ∇L_2/L_2 (Désidéri 2012, "Multiple-gradient descent algorithm"), averaged over steps with the
  weight ``decay`` from ``stability`` on.

Of each decomposition the singular values are kept that add up to less than ``energy`` of all.
Tensors that are not matrices of blocks become the mean of both, at every join. The k-th expert's
direction is what its join changed; coefficient 1 for all reproduces DOP.

``balance="fixed"`` holds w at ``stability`` and takes the minimum itself, which has a closed form.
With A = Σ_i w_i U_i Σ_i² U_iᵀ and B = Σ_i w_i V_i Σ_i² V_iᵀ, X solves A X + X B = Σ_i w_i (A_i T_i
+ T_i B_i); where that leaves X open it stays at the start. Adam's steps depend on the scale of task
vectors and, in 200 steps of 1e-4, may end before the minimum; the closed form does neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import Svd, decompose, precise
from mergesearch.merging.operators.parts.joining import Order, joining_order, refuse_order
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Selection,
    matrices_in,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: Least and greatest weight that two opposing gradients get, as in the solver that the authors use.
LEAST = 0.001

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class _Joining:
    """How two models are weighed against each other.

    Attributes:
        balance: ``adaptive`` or ``fixed``.
        stability: Weight of the merge so far, at the start or throughout.
        decay: Weight of the past in the average of weights.
        energy: Share of the singular values that are kept.
        steps: Steps of Adam.
        rate: Its learning rate.
    """

    balance: str
    stability: float
    decay: float
    energy: float
    steps: int
    rate: float


@dataclass(frozen=True, eq=False)
class Loss:
    """``L_i(X) = ‖Σ Uᵀ (X − T)‖² + ‖(X − T) V Σ‖²`` of one model.

    Attributes:
        target: T, ``(m, n)``.
        svd: Its decomposition, with what is kept.
    """

    target: torch.Tensor
    svd: Svd

    def value_and_gradient(self, merged: torch.Tensor) -> tuple[float, torch.Tensor]:
        """L and its gradient at X."""
        apart = merged - self.target
        squares = self.svd.values.square()
        left = self.svd.left.T @ apart
        right = apart @ self.svd.right.T
        value = (squares[:, None] * left.square()).sum() + (squares * right.square()).sum()
        gradient = self.svd.left @ (squares[:, None] * left) + (squares * right) @ self.svd.right
        return float(value), 2 * gradient


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    order: Order,
    balance: Annotated[
        Literal["adaptive", "fixed"],
        Field(
            description="weight of the merge so far against the new expert: chosen at every step, "
            "or fixed, and then the minimum itself"
        ),
    ] = "adaptive",
    stability: Annotated[
        Fraction, Field(description="that weight: the first one, or the fixed one")
    ] = 0.8,
    decay: Annotated[
        float,
        Field(ge=0, lt=1, description="how much of the averaged weight is kept at every step"),
    ] = 0.999,
    energy: Annotated[
        float, Field(gt=0, le=1, description="share of the singular values that counts")
    ] = 0.99999,
    steps: Annotated[int, Field(ge=0, description="steps of Adam for every join")] = 200,
    rate: Annotated[float, Field(gt=0, description="learning rate of Adam")] = 1e-4,
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
) -> Basis:
    """What every expert changes as it joins.

    Raises:
        RecipeError: If ``order`` does not hold the name of every expert once.
    """
    sequence = joining_order("dop", order, experts)
    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused)
    joining = _Joining(balance, stability, decay, energy, steps, rate)

    def rows(name: str) -> list[torch.Tensor]:
        deltas = finite_task_vectors(base, experts, name)
        parts = matrices_in(name, base.shape(name), selection)
        if not parts:
            return _averaged(deltas, sequence)
        changes = [delta.new_empty(delta.shape) for delta in deltas]
        for part in parts:
            own = [part.view(delta) for delta in deltas]
            for k, change in _joins(base, experts, part, own, sequence, joining).items():
                part.put(change, changes[k])
        return changes

    return Basis("delta", len(experts), rows)


def _averaged(deltas: Sequence[torch.Tensor], sequence: Sequence[int]) -> list[torch.Tensor]:
    """What every join changes of a tensor that becomes the mean of both, again and again."""
    changes = [delta.clone() for delta in deltas]
    merged = deltas[sequence[0]].double()
    for k in sequence[1:]:
        change = (deltas[k].double() - merged) / 2
        changes[k] = change.to(deltas[k].dtype)
        merged = merged + change
    return changes


def _joins(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: Sequence[torch.Tensor],
    sequence: Sequence[int],
    joining: _Joining,
) -> dict[int, torch.Tensor]:
    """Expert -> what its join changes of one matrix."""
    first, *rest = sequence

    def decomposed(matrix: torch.Tensor) -> Svd:
        svd = decompose(matrix, None, part.draws(), place_of(base), deltas[0].dtype)
        shares = svd.values.cumsum(0)
        whole = float(shares[-1]) if len(shares) else 0.0
        kept = int((shares < joining.energy * whole).sum()) if joining.energy < 1 else len(shares)
        return svd.top(max(kept, min(1, len(shares))))

    def compute() -> dict[str, torch.Tensor]:
        merged = precise(deltas[first])
        changes = {}
        for k in rest:
            new = precise(deltas[k])
            losses = Loss(merged, decomposed(merged)), Loss(new, decomposed(new))
            following = (minimum if joining.balance == "fixed" else descend)(losses, joining)
            changes[str(k)] = (following - merged).to(deltas[k].dtype)
            merged = following
        return changes

    key = ["joins in two projections", *part.key, list(sequence), *astuple(joining)]
    changes = remembered([base, *experts], key, compute) if rest else {}
    return {k: changes.get(str(k), delta).to(delta.device) for k, delta in enumerate(deltas)}


def descend(losses: tuple[Loss, Loss], joining: _Joining) -> torch.Tensor:
    """X after all steps of Adam from the mean, with the weight chosen at every step."""
    import torch

    old, new = losses
    merged = ((old.target + new.target) / 2).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=joining.rate)
    weight = joining.stability
    with torch.no_grad():
        for _ in range(joining.steps):
            value, gradient = old.value_and_gradient(merged)
            other_value, other = new.value_and_gradient(merged)
            if not value + other_value > 0:
                break  # both models are the merge
            chosen = least_norm(_over(gradient, value), _over(other, other_value))
            weight = joining.decay * weight + (1 - joining.decay) * chosen
            merged.grad = weight * gradient + (1 - weight) * other
            optimiser.step()
    return merged.detach()


def _over(gradient: torch.Tensor, value: float) -> torch.Tensor:
    return gradient / value if value > 0 else gradient


def least_norm(one: torch.Tensor, other: torch.Tensor) -> float:
    """The weight w at which ``‖w g_1 + (1 − w) g_2‖`` is least, within [0.001, 0.999]."""
    apart = one - other
    squared = float(apart.square().sum())
    if squared == 0:
        return 0.5
    # w = ⟨g_2, g_2 − g_1⟩ / ‖g_1 − g_2‖²
    return min(max(-float((other * apart).sum()) / squared, LEAST), 1 - LEAST)


def minimum(losses: tuple[Loss, Loss], joining: _Joining) -> torch.Tensor:
    """The minimum of ``w L_1 + (1 − w) L_2`` that is nearest to the mean."""
    import torch

    start = (losses[0].target + losses[1].target) / 2
    rows, columns = start.shape
    left = start.new_zeros(rows, rows)
    right = start.new_zeros(columns, columns)
    gradient = torch.zeros_like(start)
    for weight, loss in zip((joining.stability, 1 - joining.stability), losses, strict=True):
        squares = weight * loss.svd.values.square()
        left += (loss.svd.left * squares) @ loss.svd.left.T  # A
        right += (loss.svd.right.T * squares) @ loss.svd.right  # B
        gradient += weight * loss.value_and_gradient(start)[1] / 2
    values, vectors = torch.linalg.eigh(left)
    across, directions = torch.linalg.eigh(right)
    # A Y + Y B = −∇/2 for X = start + Y, in the eigenvectors of A and B
    sums = values[:, None] + across
    seen = sums > torch.finfo(sums.dtype).eps * max(rows, columns) * float(sums.max())
    step = torch.where(seen, -(vectors.T @ gradient @ directions) / sums, 0.0)
    found: torch.Tensor = start + vectors @ step @ directions.T
    return found


DOP = Operator(
    name="dop",
    prepare=prepare,
    summary="experts join one after another, each weighed against the merge so far in the spaces "
    "of their singular vectors",
    paper="Yang 2025, Continual model merging without data",
    family="spectral",
    scope="T",
    identities=frozenset({"base_at_zero", "single_expert", "identical_experts", "linearity"}),
    plain={"balance": "fixed"},
    plain_identities=frozenset(
        {"base_at_zero", "single_expert", "identical_experts", "linearity", "homogeneity"}
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    refuse=refuse_order,
    # Task vectors and rows; in fp64 two targets with their decompositions, X, gradients, moments.
    copies=lambda experts: 3 * experts + 26,
    order_sensitive=True,
    when="for experts that arrive one at a time, with steps to spare; `opcm` is cheaper",
)
