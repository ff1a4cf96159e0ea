"""Sparsified LoRA pools: every adapter's A is pruned before the products are added up.

Chen 2025, "Black-box model merging for language-model-as-a-service with massive model repositories"
(Evo-Merging): merged = base + Σ_k β_k B_k prune(A_k; α_k). Pruning A alone, by magnitude and matrix
by matrix, removes noise; a negative β_k takes an adapter's influence away. The coefficients of this
operator are the β, ``sparsity`` is the fraction that is pruned (the authors' code counts the
fraction that is kept).

The authors' code adds up the A and the B separately, so that its update is (Σ β_i B_i)(Σ β_j
prune(A_j)): it multiplies one adapter's B with another's A, and counts β twice. Here products are
formed first, and the merge is linear in β.

A faces the input. It is the right factor of a matrix stored as (out, in), and the left one of an
embedding or of GPT-2's linear layers. Tensors that an adapter stores whole are merged unpruned, and
so are the changes that the model below an adapter has made to the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeGuard

from pydantic import Field

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import one_minus
from mergesearch.merging.operators.parts.magnitudes import keep_largest
from mergesearch.merging.operators.parts.task_vectors import task_vectors, vector_label
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Factors, Options, TensorSource

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]


class Adapter(TensorSource, Protocol):
    """A model with a LoRA adapter, such as a checkpoint opened as MODEL+ADAPTER."""

    @property
    def changes(self) -> Mapping[str, tuple[Any, bool]]:
        """Adapted tensors: name -> anything, and whether the matrix is stored as (in, out).

        If it is, A is the left factor.
        """

    def factors(self, name: str) -> Pair | None:
        """The adapter's change of a tensor as ``(m, r)`` and ``(r, n)``, or None if it has none."""

    def low_rank(self, name: str, base: TensorSource) -> Pair | None:
        """The task vector of a tensor as factors, or None if it has to be read whole.

        A task vector of zeros has rank 0.
        """


Sparsity = Annotated[float, Field(ge=0, le=0.95)]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    sparsity: Annotated[
        Sparsity | list[Sparsity],
        Field(
            description="fraction of the entries of every A that is pruned, one number or one per "
            "adapter"
        ),
    ] = 0.5,
) -> Basis:
    """The products B · prune(A).

    Raises:
        RecipeError: If an expert is no adapter.
    """
    shares = sparsity if isinstance(sparsity, list) else [sparsity] * len(experts)
    pool = [
        (_adapter(expert), one_minus(share)) for expert, share in zip(experts, shares, strict=True)
    ]

    def rows(name: str) -> list[torch.Tensor]:
        return [_row(base, adapter, density, name) for adapter, density in pool]

    def factors(name: str) -> Factors | None:
        pairs = [_thinned_task_vector(base, adapter, density, name) for adapter, density in pool]
        known = [pair for pair in pairs if pair is not None]
        return _joined(known) if len(known) == len(pairs) else None

    return Basis("delta", len(experts), rows, factors=factors)


def _adapter(expert: TensorSource) -> Adapter:
    """The adapter that an expert is, or is seen from without some of its tensors."""
    source = expert
    while not _is_adapter(source):
        changed = getattr(source, "made", None) or getattr(source, "renamed", None)
        below = None if changed else getattr(source, "origin", None)
        if below is None:
            raise RecipeError(
                "operator lora_sparse: expected LoRA adapters as experts (MODEL+ADAPTER), received "
                f"{expert.name!r}, a full checkpoint; use breadcrumbs or ties for those"
            )
        source = below
    return source


def _is_adapter(expert: TensorSource) -> TypeGuard[Adapter]:
    return all(hasattr(expert, name) for name in ("changes", "factors", "low_rank"))


def _row(base: TensorSource, adapter: Adapter, density: float, name: str) -> torch.Tensor:
    """``B_k prune(A_k; α_k)`` in the shape of the tensor.

    Where the task vector is more than ``B_k A_k``, that part of it is replaced.
    """
    pair = _thinned_task_vector(base, adapter, density, name)
    if pair is not None:
        return _product(pair, base.read(name))
    vector = task_vectors(base, [adapter], name)[0]
    whole = adapter.factors(name)
    if whole is None:
        return vector
    thinned = _thinned(whole, adapter, density, name)
    return vector.sub_(_product(whole, vector)).add_(_product(thinned, vector))


def _thinned_task_vector(
    base: TensorSource, adapter: Adapter, density: float, name: str
) -> Pair | None:
    """B and prune(A) where their product is all that the expert changes, else None."""
    pair = adapter.low_rank(name, base)
    return None if pair is None else _thinned(pair, adapter, density, name)


def _thinned(pair: Pair, adapter: Adapter, density: float, name: str) -> Pair:
    """B and prune(A) of B and A."""
    left, right = pair
    label = vector_label(adapter, name)
    _, left_is_a = adapter.changes.get(name, (None, False))
    if left_is_a:
        return keep_largest(left, density, label), right
    return left, keep_largest(right, density, label)


def _product(pair: Pair, like: torch.Tensor) -> torch.Tensor:
    """The product of a pair with the shape and on the device of ``like``, fp32 (fp64 if it is)."""
    import torch

    from mergesearch.merging.kernels.lowrank import product

    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    left, right = (factor.to(like.device, wide) for factor in pair)
    return product(left, right).view(like.shape)


def _joined(pairs: Sequence[Pair]) -> Factors:
    """The pairs of all directions side by side."""
    import torch

    owner = tuple(k for k, (left, _) in enumerate(pairs) for _ in range(left.shape[1]))
    left = torch.cat([left for left, _ in pairs], dim=1).contiguous()
    return Factors(left, torch.cat([right for _, right in pairs]).contiguous(), owner)


def _refuse(_layout: Layout, experts: int, options: Options) -> str | None:
    sparsity = options["sparsity"]
    if isinstance(sparsity, list) and len(sparsity) != experts:
        return (
            f"sparsity: expected one number or {experts}, one per adapter, received {len(sparsity)}"
        )
    return None


_IDENTITIES = frozenset({"base_at_zero", "permutation", "linearity", "homogeneity", "zero_vector"})

LORA_SPARSE = Operator(
    name="lora_sparse",
    prepare=prepare,
    summary="LoRA adapters with pruned A, with signed coefficients",
    paper="Chen 2025, Black-box model merging for language-model-as-a-service with massive model "
    "repositories",
    family="sparse",
    scope="T",
    identities=_IDENTITIES,
    default=lambda experts, _options: 1.0 / experts,
    bounds=lambda _experts, _options: (-1.5, 1.5),
    plain={"sparsity": 0.0},
    plain_identities=_IDENTITIES | {"expert_near_one_hot", "single_expert", "identical_experts"},
    refuse=_refuse,
    copies=lambda experts: experts + 4,
    when="for large pools of LoRA adapters, some of them useless",
)
