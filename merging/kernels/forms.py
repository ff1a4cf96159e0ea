"""How base and rows of a basis combine, and the names of the kernels that combine them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
