"""Rows kept as low-rank products, added to a base without ever forming a row.

``base + Σ_r (c_owner(r) · left[:, r]) ⊗ right[r]``.

Two kernels, the same bits: numba for contiguous fp32 in main memory, blocked torch for everything
else. The terms are added in the order of r, each as a multiplication and then an addition, never
fused; terms whose coefficient is 0 are left out; NaN and infinite coefficients give NaN. So the
bits depend neither on the kernel nor on the number of threads nor on where fields or blocks cut the
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.kernels.dispatch import default_threads, term_weights
from mergesearch.merging.kernels.forms import Kernel
from mergesearch.merging.kernels.host import as_host_fp32, dtype_name
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array


#: Elements at a time where the sum needs scratch memory: a block and its scratch stay in the
#: second-level cache, since every term passes over both.
CPU_BLOCK = 1 << 16
ACCELERATOR_BLOCK = 1 << 22

#: Elements at a time, on each thread, where numba's result is rounded to another dtype.
HOST_BLOCK = 1 << 18


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape as that of a matrix: first dimension by all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def combine_factors(
    base: Array,
    left: Array,
    right: Array,
    owner: Sequence[int],
    field: Field,
    out: Array,
    *,
    kernel: Kernel = "auto",
    threads: int | None = None,
) -> None:
    """Write base plus weighted low-rank products into ``out``.

    Accumulates in fp32 (fp64 if any array is fp64) with one rounding to the dtype of ``out``.

    Args:
        base: ``(m · n,)``, numpy array, memmap or torch tensor.
        left: ``(m, R)``.
        right: ``(R, n)``.
        owner: Direction of each of the R terms.
        field: Coefficients ``(K, segments)`` over the ``m · n`` positions.
        out: ``(m · n,)``, may be ``base`` itself.
        kernel: ``auto`` takes numba where base and factors are contiguous fp32 in main memory, else
            torch.
        threads: Number of CPU threads; None takes ``OMP_NUM_THREADS``, or 1.

    Raises:
        RecipeError: If the field does not fit the arrays.
        InputError: If the arrays do not fit each other, or the numba kernel is asked for arrays it
            cannot read.
    """
    _check_shapes(base, left, right, owner, field, out)
    wide = any(dtype_name(array) == "float64" for array in (base, left, right, out))
    weights = term_weights(field, "delta", np.float64 if wide else np.float32)[1:]
    threads = default_threads() if threads is None else threads
    host = None if kernel == "torch" or wide else as_host_fp32([base, left, right])
    if host is not None and (isinstance(out, np.ndarray) or out.device.type == "cpu"):
        _combine_on_host(host, owner, weights, field.boundaries, out, threads)
    elif kernel == "numba":
        raise InputError(
            "combine_factors: kernel 'numba' expects contiguous float32 in main memory; use "
            "kernel='auto'"
        )
    else:
        _combine_by_torch((base, left, right), owner, weights, field.boundaries, out, threads)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` with the same bits on every machine, unlike a BLAS.

    Terms are added in order, and never fused.

    Args:
        left: ``(m, R)``.
        right: ``(R, n)``, on the same device, in the same dtype, fp32 or fp64.

    Returns:
        ``(m, n)``.
    """
    import torch

    out = torch.zeros(left.shape[0] * right.shape[1], dtype=left.dtype, device=left.device)
    if out.numel():
        ones = Field.constant(out.numel(), [1.0])
        combine_factors(
            out, left.contiguous(), right.contiguous(), [0] * left.shape[1], ones, out, threads=1
        )
    return out.view(left.shape[0], right.shape[1])


def _combine_on_host(
    arrays: Sequence[npt.NDArray[np.float32]],
    owner: Sequence[int],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    out: Array,
    threads: int,
) -> None:
    import torch

    from mergesearch.merging.kernels.lowrank_numba import combine
    from mergesearch.merging.kernels.torch_kernel import as_tensor, torch_threads

    base, left, right = arrays
    owners = np.array(owner, dtype=np.int64)
    target = as_tensor(out)
    if target.dtype == torch.float32 and target.is_contiguous():
        combine(base, left, right, owners, weights, boundaries, target.numpy(), 0, threads)
        return
    rows = 16 * max(HOST_BLOCK * threads // (16 * right.shape[1]), 1)  # whole tiles
    scratch = np.empty(min(rows * right.shape[1], base.size), np.float32)
    with torch_threads(threads):
        for start in range(0, base.size, scratch.size):
            block = scratch[: min(scratch.size, base.size - start)]
            combine(base, left, right, owners, weights, boundaries, block, start, threads)
            target[start : start + block.size].copy_(torch.from_numpy(block))


def _combine_by_torch(
    arrays: Sequence[Array],
    owner: Sequence[int],
    weights: npt.NDArray[Any],
    boundaries: npt.NDArray[np.int64],
    out: Array,
    threads: int,
) -> None:
    import torch

    from mergesearch.merging.kernels.torch_kernel import as_tensor, torch_threads

    base, left, right, target = (as_tensor(array) for array in (*arrays, out))
    wide = torch.float64 if weights.dtype == np.float64 else torch.float32
    left = left.to(wide)
    right = right.to(wide)
    block = CPU_BLOCK if target.device.type == "cpu" else ACCELERATOR_BLOCK
    with torch.no_grad(), torch_threads(threads):
        for segment, column in enumerate(weights.T.tolist()):
            used = [r for r, k in enumerate(owner) if column[k] != 0]
            scales = torch.tensor(
                [column[owner[r]] for r in used], dtype=wide, device=target.device
            )
            scaled = left[:, used] * scales
            first = int(boundaries[segment])
            end = int(boundaries[segment + 1])
            for start, stop, columns in row_pieces(first, end, right.shape[1], block):
                if not all(map(math.isfinite, column)):
                    target[start:stop] = math.nan
                    continue
                rows = slice(start // right.shape[1], -(-stop // right.shape[1]))
                total = base[start:stop].to(wide, copy=True).view(rows.stop - rows.start, -1)
                term = torch.empty_like(total)
                for index, r in enumerate(used):
                    # total += (c_r left_r) ⊗ right_r, as a separate addition: addcmul may fuse, and
                    # round once instead of twice.
                    torch.mul(scaled[rows, index, None], right[r, columns], out=term)
                    total.add_(term)
                target[start:stop].copy_(total.view(-1))


def row_pieces(start: int, stop: int, n: int, block: int) -> list[tuple[int, int, slice]]:
    """Cut positions of a matrix of n columns into parts of one row or of whole rows.

    Each is (start, stop, columns).
    """
    pieces = []
    while start < stop:
        column = start % n
        rows = min(stop - start, block) // n if column == 0 else 0
        end = start + rows * n if rows else min(stop, start + n - column)
        pieces.append((start, end, slice(column, column + (n if rows else end - start))))
        start = end
    return pieces


def _check_shapes(
    base: Array, left: Array, right: Array, owner: Sequence[int], field: Field, out: Array
) -> None:
    m, rank = left.shape
    other_rank, n = right.shape
    if rank != other_rank or rank != len(owner):
        raise InputError(
            f"combine_factors: expected one rank, received {rank}, {other_rank} and {len(owner)} "
            "owners"
        )
    for name, array in (("base", base), ("out", out)):
        if tuple(array.shape) != (m * n,):
            raise InputError(
                f"combine_factors: expected {name} of shape {(m * n,)}, received "
                f"{tuple(array.shape)}"
            )
    if field.size != m * n or any(not 0 <= k < field.directions for k in owner):
        raise RecipeError(
            f"combine_factors: expected a field over {m * n} positions with a row for each owner, "
            f"received {field.directions} rows over {field.size}"
        )
