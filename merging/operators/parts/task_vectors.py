"""Task vectors, tensor by tensor: what nearly every operator starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.kernels.host import all_finite, stored_numbers
from mergesearch.merging.tensors.source import Factors, TensorSource

if TYPE_CHECKING:
    import torch


@runtime_checkable
class LowRankSource(Protocol):
    """An expert that knows its task vectors as low-rank products: a model with an adapter."""

    def low_rank(self, name: str, base: TensorSource) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The task vector as ``(m, r)`` and ``(r, n)``, or None if it has to be read whole.

        A task vector of zeros has rank 0.
        """

    def delta(self, name: str, base: TensorSource) -> torch.Tensor | None:
        """The task vector, in fp32 or fp64, where it is known without a difference, else None."""


def task_vectors(
    base: TensorSource, experts: Sequence[TensorSource], name: str
) -> list[torch.Tensor]:
    """``τ_k = θ_k − θ_0`` of one tensor for every expert.

    They are new tensors, in fp32 (fp64 where a source is fp64).
    """
    origin = base.read(name)
    return [_task_vector(base, expert, name, origin) for expert in experts]


def finite_task_vectors(
    base: TensorSource, experts: Sequence[TensorSource], name: str
) -> list[torch.Tensor]:
    """:func:`task_vectors`, all of whose numbers are finite.

    For operators that drop elements or compare signs, which would hide what is not a number.

    Raises:
        CheckpointError: If a task vector holds NaN or infinity.
    """
    vectors = task_vectors(base, experts, name)
    for expert, vector in zip(experts, vectors, strict=True):
        if not all_finite(vector):
            raise CheckpointError(
                f"{vector_label(expert, name)}: expected finite numbers, received NaN or infinity "
                "in expert or base; leave that checkpoint out, or save it again"
            )
    return vectors


def vector_label(expert: TensorSource, name: str) -> str:
    """The task vector of a tensor, in the words of messages."""
    return f"expert {expert.name!r}: tensor {name!r}"


def task_factors(base: TensorSource, experts: Sequence[TensorSource], name: str) -> Factors | None:
    """The task vectors of all experts as factors, None unless all are low-rank or zero."""
    import torch

    pairs = []
    for expert in experts:
        source = _low_rank_source(expert, name)
        pair = None if source is None else source.low_rank(name, base)
        if pair is None:
            return None
        pairs.append(pair)
    owner = tuple(k for k, (left, _) in enumerate(pairs) for _ in range(left.shape[1]))
    left = torch.cat([left for left, _ in pairs], dim=1)
    right = torch.cat([right for _, right in pairs])
    return Factors(left.contiguous(), right.contiguous(), owner)


def _task_vector(
    base: TensorSource, expert: TensorSource, name: str, origin: torch.Tensor
) -> torch.Tensor:
    source = _low_rank_source(expert, name)
    exact = None if source is None else source.delta(name, base)
    return difference(expert.read(name), origin) if exact is None else exact.to(origin.device)


def is_stored_whole(experts: Sequence[TensorSource], name: str) -> bool:
    """Whether every expert stores the tensor itself, rather than an adapter's change of it."""
    return all(_low_rank_source(expert, name) is None for expert in experts)


def _low_rank_source(expert: object, name: str) -> LowRankSource | None:
    """The adapter that a tensor of an expert comes from, or None.

    Sources that pass on what another one reads are followed to that one, as long as it has the
    same name there.
    """
    while expert is not None and not isinstance(expert, LowRankSource):
        other = name in getattr(expert, "made", ()) or name in getattr(expert, "renamed", ())
        expert = None if other else getattr(expert, "origin", None)
    return expert


def difference(tensor: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """``tensor − origin`` as a new tensor on the device of ``origin``.

    It is in fp32 (fp64 if either is fp64).
    """
    import torch

    wide = torch.float64 if torch.float64 in (tensor.dtype, origin.dtype) else torch.float32
    one = stored_numbers(tensor)
    other = stored_numbers(origin)
    if one is None or other is None:
        return tensor.to(origin.device, wide) - origin.to(wide)
    from mergesearch.merging.kernels.source_numba import difference as write_difference

    result = torch.empty(origin.shape, dtype=wide)
    write_difference(one, other, result.view(-1).numpy())
    return result
