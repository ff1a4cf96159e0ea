"""Gram matrices of large matrices, and the eigenvectors of their largest eigenvalues.

A symmetric matrix is first made tridiagonal, which takes a third of the time; of its eigenvectors
only those that are asked for are then worked out. LAPACK's ``?syevr`` does that (Dhillon 2004,
"Multiple representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices"),
and in fp32 it is also more exact than torch's ``?syevd``. Torch has no such function, and scipy's
holds Python's lock while it runs, so that it is called from here as scipy offers it to compiled
code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.place import Place

#: Columns of a matrix that are multiplied at a time, and blocks of rows of a Gram matrix: only the
#: blocks up to the diagonal are worked out.
COLUMNS = 1 << 11
BLOCKS = 8


def wide_view(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or its transpose, whichever has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def lower_gram(matrix: torch.Tensor, dtype: torch.dtype, place: Place) -> torch.Tensor:
    """The lower triangle of ``A Aᵀ``, or of ``Aᵀ A`` if that is smaller; above it lies anything.

    Args:
        matrix: A, ``(m, n)``.
        dtype: To multiply and add in.
        place: Where. The matrix goes there piece by piece, if it lies elsewhere.

    Returns:
        ``(s, s)`` for ``s = min(m, n)``, on the device of the work.
    """
    return lower_product(wide_view(matrix), dtype, place)


def lower_product(wide: torch.Tensor, dtype: torch.dtype, place: Place) -> torch.Tensor:
    """:func:`lower_gram`, but of ``A Aᵀ`` whichever side is smaller: ``(m, m)``."""
    import torch

    size = len(wide)
    gram = torch.zeros((size, size), dtype=dtype, device=place.device_of(wide))
    step = min(COLUMNS, place.room(2 * size * gram.element_size(), held=2 * gram.nbytes))
    for start in range(0, wide.shape[1], step):
        piece = wide[:, start : start + step].to(gram.device, dtype)
        for first, stop in _blocks(size):
            gram[first:stop, :stop].addmm_(piece[first:stop], piece[:stop].T)
    return gram


def gathered(wide: torch.Tensor, columns: torch.Tensor, place: Place) -> torch.Tensor:
    """``A X`` piece by piece, on the device of the work, for ``(s, n)`` and ``(n, r)``."""
    import torch

    device = place.device_of(wide)
    total = torch.zeros((len(wide), columns.shape[1]), dtype=columns.dtype, device=device)
    row = 2 * (len(wide) + columns.shape[1]) * total.element_size()
    step = place.room(row, held=2 * total.nbytes)
    for start in range(0, wide.shape[1], step):
        piece = wide[:, start : start + step].to(device, total.dtype)
        total.addmm_(piece, columns[start : start + step].to(device))
    return total


def projected(matrix: torch.Tensor, vectors: torch.Tensor, place: Place) -> torch.Tensor:
    """``Aᵀ X``, or ``A X`` where A has more rows than columns, piece by piece.

    Args:
        matrix: A, ``(m, n)``.
        vectors: X, ``(min(m, n), r)``, on the device of the work; its dtype is that of the result.
        place: Whose allowance holds.

    Returns:
        ``(max(m, n), r)``, on the device of the matrix.
    """
    wide = wide_view(matrix)
    result = matrix.new_empty((wide.shape[1], vectors.shape[1]), dtype=vectors.dtype)
    row = 2 * (len(wide) + vectors.shape[1]) * vectors.element_size()
    step = place.room(row, held=vectors.nbytes)
    if wide.dtype != vectors.dtype:
        step = min(step, COLUMNS)  # no whole copy in the wider dtype
    for start in range(0, wide.shape[1], step):
        piece = wide[:, start : start + step].to(vectors.device, vectors.dtype)
        result[start : start + step] = (piece.T @ vectors).to(matrix.device)
    return result


def largest_eigenvectors(lower: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues of a symmetric matrix, with their eigenvectors.

    Args:
        lower: ``(s, s)``; what lies above the diagonal is not read.
        count: 1 to s.

    Returns:
        Eigenvalues ``(count,)``, decreasing, and eigenvectors ``(s, count)``, in its dtype.
    """
    import torch

    if lower.device.type == "cpu":
        found = by_lapack(lower.contiguous().numpy(), count)
        if found is not None:
            values, rows = found
            return torch.from_numpy(values).flip(0), torch.from_numpy(rows).flip(0).T
    values, vectors = torch.linalg.eigh(lower, UPLO="L")
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def _blocks(size: int) -> list[tuple[int, int]]:
    bounds = [size * block // BLOCKS for block in range(BLOCKS + 1)]
    return [(first, stop) for first, stop in pairwise(bounds) if stop > first]


def by_lapack(
    lower: npt.NDArray[Any], count: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Eigenvalues ``(count,)``, ascending, and eigenvectors ``(count, s)``; None if it gave up."""
    size = len(lower)
    number = ctypes.c_float if lower.dtype == np.float32 else ctypes.c_double
    matrix = lower.copy()  # it is overwritten
    values = np.empty(size, lower.dtype)
    vectors = np.empty((count, size), lower.dtype)
    support = np.empty(2 * size, np.int32)
    info = ctypes.c_int(0)

    def call(work: npt.NDArray[Any], work_size: int, whole: npt.NDArray[Any], size_: int) -> None:
        _function(lower.dtype.char)(
            ctypes.c_char_p(b"V"),  # with eigenvectors
            ctypes.c_char_p(b"I"),  # of the eigenvalues of these ranks
            ctypes.c_char_p(b"U"),  # by columns, the lower triangle is the upper one
            _integer(size),
            matrix.ctypes.data,
            _integer(size),
            ctypes.byref(number(0)),
            ctypes.byref(number(0)),
            _integer(size - count + 1),
            _integer(size),
            ctypes.byref(number(0)),  # the default tolerance
            _integer(0),
            values.ctypes.data,
            vectors.ctypes.data,
            _integer(size),
            support.ctypes.data,
            work.ctypes.data,
            _integer(work_size),
            whole.ctypes.data,
            _integer(size_),
            ctypes.byref(info),
        )

    asked = np.zeros(1, lower.dtype)
    asked_whole = np.zeros(1, np.int32)
    call(asked, -1, asked_whole, -1)
    work = np.empty(int(asked[0]), lower.dtype)
    whole = np.empty(int(asked_whole[0]), np.int32)
    with one_blas_thread():
        call(work, len(work), whole, len(whole))
    return (values[:count], vectors) if info.value == 0 else None


def _integer(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _function(kind: str) -> Callable[..., None]:
    """LAPACK's ``ssyevr`` or ``dsyevr``; calls through ctypes let other threads run."""
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[{"f": "ssyevr", "d": "dsyevr"}[kind]]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype = ctypes.c_char_p
    name.argtypes = [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 21)
    return prototype(pointer(capsule, name(capsule)))


_running = Lock()
_calls: list[Any] = []  # the limit that holds, once for every call that runs


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep scipy's library on one thread while any call runs: its bits depend on their number."""
    from threadpoolctl import threadpool_limits

    with _running:
        _calls.append(_calls[0] if _calls else threadpool_limits(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _running:
            limit = _calls.pop()
            if not _calls:
                limit.restore_original_limits()
