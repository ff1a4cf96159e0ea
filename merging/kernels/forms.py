"""How base and rows of a basis combine, and the names of the kernels that combine them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = npt.NDArray[Any] | torch.Tensor

#: How the terms c_k b_k of a position become one number, once a sign has been elected: the sign of
#: their sum. Terms of another sign are dropped; the rest is added up, averaged (by number, or by
#: weight |c_k|), or represented by the largest. Where the sum is exactly 0 no sign is elected and
#: nothing is added.
Election = Literal["elect_sum", "elect_mean", "elect_weighted", "elect_max"]

#: ``delta``: base + Σ c_k b_k. ``interpolation``: (1 − Σ c_k) base + Σ c_k b_k. ``slerp``: one row,
#: on the arc from the base (c = 0) to the row (c = 1). The elections: base + elected(c_1 b_1, ...,
#: c_K b_K).
Form = Literal["delta", "interpolation", "slerp"] | Election

Kernel = Literal["auto", "numba", "torch"]

FORMS: tuple[str, ...] = ("delta", "interpolation", "slerp", *get_args(Election))

ELECTIONS: tuple[str, ...] = get_args(Election)


@dataclass(frozen=True)
class Thinning:
    """What becomes of one task vector before it is merged.

    Elements are dropped by chance, the survivors multiplied, and those below a magnitude dropped.

    Attributes:
        limit: The magnitude from which on elements are kept; 0 keeps all.
        key: Of the random bits of its elements, 128 bits; None where none is dropped by chance.
        chance: An element survives where its 32 random bits are below this number.
        factor: What survivors are multiplied by, rounded to fp32; 1 where none is dropped by
            chance.
        made: Whether the numbers are the task vector itself, rather than an expert's.
    """

    limit: float = 0.0
    key: int | None = None
    chance: int = 0
    factor: float = 1.0
    made: bool = False


KEEP_ALL = Thinning()

#: A task vector that has been thinned before.
MADE = Thinning(made=True)


@dataclass(frozen=True, eq=False)
class Patches:
    """What is to be written over a merged tensor once statistics of the whole model are known.

    Attributes:
        positions: ``(n,)``, int64, ascending; None for all positions.
        numbers: ``(n,)``, as the merged tensor holds them: fp32, or bf16 as its bits in uint16.
        lost: What they change in Σ (stored − merged)².
        change: What they change in Σ (merged − base)².
    """

    positions: npt.NDArray[np.int64] | None
    numbers: npt.NDArray[Any]
    lost: float
    change: float
