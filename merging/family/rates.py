"""What machines do in a second when they prepare: known cards, and this machine by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.operators.parts.eigenvectors import (
    by_lapack,
    largest_eigenvectors,
    lower_gram,
    one_blas_thread,
)
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch

#: Side of the matrix on which rates are measured; the rates of larger ones are alike.
SAMPLE = 768

#: Bytes of weights that are read in a second from a disk of today, and are written as rows.
READ = 2e9


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        read: Bytes of weights that are read and, as rows, written.
        multiply: fp32 operations of matrix products.
        multiply_wide: fp64 operations of matrix products.
        few: s³ of the eigenvectors of a quarter of the eigenvalues, in the dtype that is used.
        every: s³ of all eigenvectors in fp64.
        move: Bytes between main memory and the device; None if it is main memory.
        measured: Whether on this machine; the table's are reckoned from data sheets.
    """

    read: float
    multiply: float
    multiply_wide: float
    few: float
    every: float
    move: float | None = None
    measured: bool = False


#: Rates of known cards, reckoned and not measured: 70 % of the data sheet's matrix products, and
#: eigenvectors of s = 4096 in about a second, which the number of launches bounds rather than
#: arithmetic.
CARD_RATES: Mapping[str, Rates] = {
    "a100-40": Rates(2e9, 13e12, 13e12, 5e10, 5e10, 20e9),
    "a100-80": Rates(2e9, 13e12, 13e12, 5e10, 5e10, 20e9),
    "h100-80": Rates(2e9, 45e12, 45e12, 7e10, 7e10, 40e9),
    "h200-141": Rates(2e9, 45e12, 45e12, 7e10, 7e10, 40e9),
    "b200-192": Rates(2e9, 50e12, 26e12, 7e10, 7e10, 40e9),
}


def measured_rates(read: float = READ, place: Place = HOST, sample: int = SAMPLE) -> Rates:
    """The rates of one thread, or of an accelerator, measured in about half a second.

    Those of main memory are measured without torch, which takes longer to import; its products and
    numpy's take the same time within the noise of a busy machine.

    Args:
        read: Bytes a second at which weights are read; depends on where they lie.
        place: What is measured.
        sample: Side of the matrix that is worked on.
    """
    matrix = np.random.default_rng(0).standard_normal((sample, sample), dtype=np.float32)
    return _host_rates(read, matrix) if place.is_host else _device_rates(read, matrix, place)


def _host_rates(read: float, matrix: npt.NDArray[np.float32]) -> Rates:
    wide = matrix.astype(np.float64)
    size = len(matrix)
    with one_blas_thread():
        return Rates(
            read=read,
            multiply=2 * size**3 / _least_seconds(lambda: matrix @ matrix),
            multiply_wide=2 * size**3 / _least_seconds(lambda: wide @ wide),
            few=size**3 / _least_seconds(lambda: by_lapack(matrix @ matrix.T, size // 4)),
            every=size**3 / _least_seconds(lambda: by_lapack(wide @ wide.T, size)),
            measured=True,
        )


def _device_rates(read: float, matrix: npt.NDArray[np.float32], place: Place) -> Rates:
    import torch

    there = torch.from_numpy(matrix)
    held = there.to(place.device)
    wide = held.double()
    size = len(matrix)
    rates = Rates(
        read=read,
        multiply=2 * size**3 / _least_seconds(lambda: _waited(held @ held)),
        multiply_wide=2 * size**3 / _least_seconds(lambda: _waited(wide @ wide)),
        few=size**3 / _least_seconds(lambda: _waited(_vectors(held, size // 4))),
        every=size**3 / _least_seconds(lambda: _waited(_vectors(wide, size))),
        measured=True,
    )
    seconds = _least_seconds(lambda: there.to(place.device).cpu())
    return replace(rates, move=2 * matrix.nbytes / seconds)


def _vectors(matrix: torch.Tensor, count: int) -> torch.Tensor:
    return largest_eigenvectors(lower_gram(matrix, matrix.dtype, HOST), count)[1]


def _waited(result: torch.Tensor) -> torch.Tensor:
    """A part of a result in main memory, which is there once the accelerator is done."""
    return result.reshape(-1)[:1].cpu()


def _least_seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The least time of some repeats."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
