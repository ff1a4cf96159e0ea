"""Tensors that are combined otherwise than their operator would: their names, and their rules."""

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

    @classmethod
    def of_statistics(cls, names: Sequence[str]) -> SpecialTensors:
        """Running statistics of these names, merged linearly."""
        variances = [name for name in names if name.endswith("running_var")]
        return cls(frozenset(names), frozenset(variances))

    @property
    def postprocessed(self) -> frozenset[str]:
        """Tensors whose weighted sum still has to go through :func:`postprocess`."""
        return self.variances | self.logs


#: No special tensors: every tensor is combined by its operator.
PLAIN = SpecialTensors()


def running_statistics(names: Collection[str]) -> tuple[str, ...]:
    """Names of running statistics among ``names``.

    A ``running_mean`` counts only with its ``running_var``, and the other way round.
    """
    known = {*names}

    def is_one(name: str) -> bool:
        prefix, _, last = name.rpartition("running_")
        return (
            last in ("mean", "var") and {f"{prefix}running_mean", f"{prefix}running_var"} <= known
        )

    return tuple(name for name in names if is_one(name))


def is_logarithm(name: str) -> bool:
    """Whether a scalar of this name is stored as a logarithm, as CLIP's temperature is."""
    last = name.rpartition(".")[2]
    return last == "logit_scale" or last.startswith("log_")


def in_log_space(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``b (1 + log(e / b))`` for a scalar ``e`` of an expert and ``b`` of the base.

    Its task vector is ``b log(e / b)``, so that :func:`postprocess` makes ``b Π (e_k / b)^c_k`` of
    a weighted sum. The result is in fp32, or in fp64 if either is.
    """
    import torch

    wide = torch.float64 if torch.float64 in (tensor.dtype, base.dtype) else torch.float32
    origin = base.to(wide)
    return origin + origin * torch.log(tensor.to(origin.device, wide) / origin)


def postprocess(
    special: SpecialTensors, name: str, total: torch.Tensor, base: torch.Tensor, dtype: str
) -> torch.Tensor:
    """The merged tensor that the weighted sum ``total`` stands for.

    Args:
        special: Of the merge.
        name: Of the tensor.
        total: The weighted sum, in the accumulation dtype.
        base: The base's tensor in the same dtype and shape.
        dtype: In which the merged tensor is stored.
    """
    import torch

    if name in special.logs:
        # total = b + Σ c_k b log(e_k / b), so this is b Π (e_k / b)^c_k.
        return base * torch.exp((total - base) / base)
    if name in special.variances:
        below = total < 0
        if bool(below.any()):
            warnings.warn(
                f"merged {name!r}: variances became negative and are set to a tiny positive "
                "number; smaller coefficients keep the statistics in range",
                stacklevel=2,
            )
            return torch.where(
                below, torch.full_like(total, torch.finfo(getattr(torch, dtype)).tiny), total
            )
    return total


def postprocess_gradient(
    special: SpecialTensors, name: str, total: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Derivative of :func:`postprocess` with respect to ``total``.

    That of variances, which may jump, is never asked for.
    """
    import torch

    if name in special.logs:
        # d/dtotal of b exp((total − b) / b)
        return torch.exp((total - base) / base)
    return torch.ones_like(total)
