"""Inner products of one vector with base and rows over segments of the flat index.

They are the gradient of coefficients (:mod:`mergesearch.merging.resident.gradient`).

One pass over the vector, the rows and, where it is asked for, the base. Everything is summed in
fp64. Two kernels: numba for contiguous fp32 in main memory, blocked torch for everything else.
Segments are cut into pieces of a fixed length, and the sums of the pieces added in order, so that
the bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.dispatch import default_threads
from mergesearch.merging.kernels.forms import Kernel
from mergesearch.merging.kernels.host import as_host_fp32

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array

#: Elements of a piece in main memory. Torch takes longer ones, an accelerator needs long launches.
PIECE = 1 << 16
CPU_BLOCK = 1 << 18
ACCELERATOR_BLOCK = 1 << 24

#: Elements that torch adds in one go: fewer than it would share among threads.
_RUN = 1 << 10

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]


def products(
    vector: Array,
    rows: Array | Sequence[Array],
    boundaries: _Index,
    *,
    base: Array | None = None,
    from_base: bool = False,
    kernel: Kernel = "auto",
    threads: int | None = None,
) -> _Wide:
    """Inner products of ``vector`` with the base, if given, and with every row, over segments.

    Args:
        vector: ``(n,)``, numpy array, memmap or torch tensor.
        rows: ``(K, n)``, or a sequence of K arrays ``(n,)``.
        boundaries: ``(segments + 1,)``, from 0 to n.
        base: ``(n,)``; its products come first.
        from_base: Rows are taken minus the base, which is subtracted in fp64 before anything is
            summed.
        kernel: ``auto`` takes numba for contiguous fp32 in main memory, else torch.
        threads: CPU threads; None takes ``OMP_NUM_THREADS``, or 1.

    Returns:
        fp64 ``(K, segments)``, or ``(1 + K, segments)`` with a base.

    Raises:
        InputError: If lengths differ, or the numba kernel is asked for arrays that it cannot read.
    """
    others = [*([] if base is None else [base]), *rows]
    length = int(boundaries[-1])
    for array in (vector, *others):
        if tuple(array.shape) != (length,):
            raise InputError(
                f"products: expected arrays of shape {(length,)}, received {tuple(array.shape)}"
            )
    threads = default_threads() if threads is None else threads
    host = None if kernel == "torch" else as_host_fp32([vector, *others])
    if host is not None:
        from mergesearch.merging.kernels import products_numba

        starts, stops, owners = cut(boundaries, PIECE)
        sums = products_numba.products(host[0], host[1:], starts, stops, from_base, threads)
    elif kernel == "numba":
        raise InputError(
            "products: kernel 'numba' expects contiguous float32 in main memory; use kernel='auto'"
        )
    else:
        starts, stops, owners = cut(boundaries, block_of(vector))
        sums = _by_torch(vector, others, starts, stops, from_base, threads)
    return joined(sums, owners, len(boundaries) - 1)


def factor_products(
    vector: Array,
    left: Array,
    right: Array,
    owner: Sequence[int],
    directions: int,
    boundaries: _Index,
    *,
    threads: int | None = None,
) -> _Wide:
    """Inner products of ``vector`` ``(m · n,)`` with rows that are kept as factors, over segments.

    Args:
        vector: ``(m · n,)``, numpy array or torch tensor.
        left: ``(m, R)``, on the same device.
        right: ``(R, n)``.
        owner: Direction of each of the R terms.
        directions: Number of directions K.
        boundaries: ``(segments + 1,)``, from 0 to ``m · n``.
        threads: CPU threads; None takes ``OMP_NUM_THREADS``, or 1.

    Returns:
        fp64 ``(K, segments)``.
    """
    import torch

    from mergesearch.merging.kernels.torch_kernel import as_tensor, torch_threads

    flat = as_tensor(vector)
    one = as_tensor(left).double()
    other = as_tensor(right).double()
    terms = torch.zeros((len(owner), len(boundaries) - 1), dtype=torch.float64, device=flat.device)
    threads = default_threads() if threads is None else threads
    # On a CPU one thread, since the order in which a BLAS adds depends on their number.
    with torch.no_grad(), torch_threads(1 if flat.device.type == "cpu" else threads):
        for segment, start, stop, rows, columns in tiles(
            boundaries, int(right.shape[1]), block_of(vector)
        ):
            part = flat[start:stop].double().view(rows.stop - rows.start, -1)
            # Σ_ij v_ij left_ir right_rj for every term r
            terms[:, segment] += ((part @ other[:, columns].T) * one[rows]).sum(0)
    sums = np.zeros((directions, len(boundaries) - 1))
    np.add.at(sums, list(owner), terms.cpu().numpy())
    return sums


def cut(boundaries: _Index, length: int) -> tuple[_Index, _Index, _Index]:
    """Pieces of at most ``length`` that no boundary cuts.

    Their starts, stops and segments, each ``(pieces,)``.
    """
    grid = np.arange(0, int(boundaries[-1]), length)
    edges = np.union1d(boundaries, grid).astype(np.int64)
    return edges[:-1], edges[1:], np.searchsorted(boundaries, edges[:-1], side="right") - 1


def joined(sums: _Wide, owners: _Index, segments: int) -> _Wide:
    """Sums of the pieces of each segment: ``(rows, pieces) -> (rows, segments)``."""
    total = np.zeros((segments, len(sums)))
    np.add.at(total, owners, sums.T)
    return np.ascontiguousarray(total.T)


def tiles(
    boundaries: _Index, width: int, block: int
) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Cut a matrix into parts of one row or of whole rows.

    Each is (segment, start, stop, rows, columns).
    """
    from mergesearch.merging.kernels.lowrank import row_pieces

    for segment, (first, end) in enumerate(pairwise(boundaries.tolist())):
        for start, stop, columns in row_pieces(first, end, width, block):
            yield segment, start, stop, slice(start // width, -(-stop // width)), columns


def block_of(vector: Array) -> int:
    """Length of a piece for torch on the vector's device."""
    on_host = isinstance(vector, np.ndarray) or vector.device.type == "cpu"
    return CPU_BLOCK if on_host else ACCELERATOR_BLOCK


def _by_torch(
    vector: Array,
    others: Sequence[Array],
    starts: _Index,
    stops: _Index,
    from_base: bool,
    threads: int,
) -> _Wide:
    import torch

    from mergesearch.merging.kernels.torch_kernel import as_tensor, torch_threads

    flat = as_tensor(vector)
    tensors = [as_tensor(other) for other in others]
    sums = torch.zeros((len(tensors), len(starts)), dtype=torch.float64, device=flat.device)
    with torch.no_grad(), torch_threads(threads):
        for piece, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            wide = flat[start:stop].double()
            origin = tensors[0][start:stop].double() if from_base else None
            for row, tensor in enumerate(tensors):
                term = tensor[start:stop].double()
                if origin is not None and row:
                    term = term - origin
                sums[row, piece] = fixed_sum(wide * term)  # Σ_i v_i r_i, or Σ_i v_i (r_i − b_i)
    return sums.cpu().numpy()


def fixed_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of ``(n,)`` in an order that the number of threads does not change."""
    whole = values.numel() // _RUN * _RUN
    return values[:whole].view(-1, _RUN).sum(1).sum() + values[whole:].sum()
