"""treatment."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SpecialTensors:
    """Tensors of a layout that are combined otherwise than an operator would.

    Attributes:
        statistics: Running statistics: their rows are plain task vectors, whatever the operator.
        variances: Those of them that must not become negative.
        logs: Scalars that are summed as logarithms.
    """

    statistics: frozenset[str] = frozenset()
    variances: frozenset[str] = frozenset()
    logs: frozenset[str] = frozenset()

    @property
    def postprocessed(self) -> frozenset[str]:
        """Tensors whose weighted sum still has to go through :func:`postprocess`."""
        return self.variances | self.logs


#: Every tensor as its operator has it.
PLAIN = SpecialTensors()


def running_statistics(names: Collection[str]) -> tuple[str, ...]:
    """Those of ``names`` that are running statistics: a ``running_mean`` with its
    ``running_var``.
    """
    known = {*names}

    def is_one(name: str) -> bool:
        prefix, _, last = name.rpartition("running_")
        return (
            last in ("mean", "var") and {f"{prefix}running_mean", f"{prefix}running_var"} <= known
        )

    return tuple(name for name in names if is_one(name))


def statistics_treatment(names: Sequence[str]) -> SpecialTensors:
    """How running statistics are merged linearly."""
    return SpecialTensors(
        frozenset(names), frozenset(name for name in names if name.endswith("running_var"))
    )


def is_logarithm(name: str) -> bool:
    """Whether a scalar of this name is stored as a logarithm, as CLIP's temperature is."""
    return name.rpartition(".")[2] == "logit_scale" or name.rpartition(".")[2].startswith("log_")


def in_log_space(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``b (1 + log(e / b))`` for a scalar ``e`` of an expert and ``b`` of the base, in fp32 (fp64
    if either is).

    Its task vector is ``b log(e / b)``, so that :func:`postprocess` finds ``b Π (e_k / b)^c_k``
    from a weighted sum.
    """
    import torch

    wide = torch.float64 if torch.float64 in (tensor.dtype, base.dtype) else torch.float32
    origin = base.to(wide)
    return origin + origin * torch.log(tensor.to(origin.device, wide) / origin)


def postprocess(
    treatment: SpecialTensors, name: str, total: torch.Tensor, base: torch.Tensor, dtype: str
) -> torch.Tensor:
    """What the weighted sum ``total`` of a tensor stands for; the same bits in an arena and in a
    stream.

    Args:
        treatment: Of the merge.
        name: Of the tensor.
        total: The weighted sum, in the accumulation dtype.
        base: The base's tensor in the same dtype and shape.
        dtype: In which the merged tensor is stored.
    """
    import torch

    if name in treatment.logs:
        return base * torch.exp((total - base) / base)
    if name in treatment.variances:
        below = total < 0
        if bool(below.any()):
            warnings.warn(
                f"merged {name!r}: variances became negative and are set to a tiny positive "
                "number; "
                "smaller coefficients keep the statistics in range",
                stacklevel=2,
            )
            return torch.where(
                below, torch.full_like(total, torch.finfo(getattr(torch, dtype)).tiny), total
            )
    return total


def postprocess_gradient(
    treatment: SpecialTensors, name: str, total: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Derivative of :func:`postprocess` with respect to ``total``; that of variances, which may
    jump, is never asked for.
    """
    import torch

    if name in treatment.logs:
        return torch.exp((total - base) / base)
    return torch.ones_like(total)
