"""``combine``: checks its arrays, works out the weights of the terms, and picks a kernel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.kernels.forms import ELECTIONS, Form, Kernel
from mergesearch.merging.kernels.host import as_host_fp32, dtype_name
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array


def combine(
    base: Array,
    basis: Array | Sequence[Array],
    field: Field,
    form: Form,
    out: Array,
    *,
    angles: Field | None = None,
    kernel: Kernel = "auto",
    threads: int | None = None,
) -> None:
    """Write the weighted sum of ``base`` and the rows of ``basis`` into ``out``.

    A coefficient of 0 leaves its term out, so that zero coefficients give the base bit for bit, and
    a one-hot interpolation gives the row bit for bit (the base is then not read). NaN and infinite
    coefficients give NaN. Accumulates in fp32 (fp64 if any array is fp64) with one rounding to the
    dtype of ``out``.

    Args:
        base: ``(n,)``, numpy array, memmap or torch tensor.
        basis: ``(K, n)``, or a sequence of K arrays ``(n,)``.
        field: Coefficients ``(K, segments)`` over n positions.
        form: How base and rows combine.
        out: ``(n,)``, may be ``base`` itself but must not overlap the rows.
        angles: For ``slerp``: the angle between base and row over the positions, one direction.
        kernel: ``auto`` takes numba for contiguous fp32 in main memory, else torch.
        threads: Number of CPU threads; None takes ``OMP_NUM_THREADS``, or 1.

    Raises:
        RecipeError: If the field does not fit the arrays.
        InputError: If the arrays differ in length, or the numba kernel is asked for arrays that it
            cannot read.
    """
    rows = list(basis)
    _check_shapes(base, rows, field, out)
    arrays = [base, *rows, out]
    if form == "slerp":
        field = refined_to_angles(field, angles)
    wide = any(dtype_name(array) == "float64" for array in arrays)
    weights = term_weights(field, form, np.float64 if wide else np.float32, angles)
    election = form if form in ELECTIONS else ""
    threads = default_threads() if threads is None else threads
    host = None if kernel == "torch" else as_host_fp32(arrays)
    if host is not None:
        from mergesearch.merging.kernels import numba_kernel

        numba_kernel.combine(host[:-1], weights, field.boundaries, host[-1], threads, election)
    elif kernel == "numba":
        raise InputError(
            "combine: kernel 'numba' expects contiguous float32 in main memory; use kernel='auto'"
        )
    else:
        from mergesearch.merging.kernels import torch_kernel

        torch_kernel.combine(arrays[:-1], weights, field.boundaries, out, threads, election)


def term_weights(
    field: Field, form: Form, dtype: npt.DTypeLike = np.float32, angles: Field | None = None
) -> npt.NDArray[Any]:
    """Coefficients of base and rows: ``(K + 1, segments)``, base first.

    Computed in float64 and rounded once.

    For ``slerp`` the field must be refined to the boundaries of ``angles``.
    """
    # A search may propose anything; it becomes NaN weights.
    with np.errstate(over="ignore", invalid="ignore"):
        if form == "slerp":
            return np.ascontiguousarray(_arc_weights(field, angles).astype(dtype))
        first = _rest_of_one(field.values) if form == "interpolation" else np.ones(field.segments)
        return np.ascontiguousarray(np.vstack([first, field.values]).astype(dtype))


def accumulation_dtype(layout: Layout) -> Literal["float32", "float64"]:
    """Dtype of arenas and of every sum: ``float64`` if a tensor of the base is fp64.

    Else ``float32``.
    """
    return "float64" if any(spec.dtype == "float64" for spec in layout.tensors) else "float32"


def default_threads() -> int:
    """``OMP_NUM_THREADS`` (its first level), or 1."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else 1


def _rest_of_one(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 − Σ c_k, ``(K, segments) -> (segments,)``, with what is only rounding taken as 0.

    Ten times 1/10 sums to 1 − 2^-53; the uniform average would read the base and hold a trace of
    it.
    """
    total = np.zeros(values.shape[1])
    magnitude = np.zeros(values.shape[1])
    for row in values:  # not np.sum: its order depends on the number of segments
        total = total + row
        magnitude = magnitude + np.abs(row)
    rest = 1.0 - total
    return np.where(np.abs(rest) <= len(values) * 2.0**-53 * magnitude, 0.0, rest)


def refined_to_angles(field: Field, angles: Field | None) -> Field:
    """The coefficients on segments that lie within one angle each."""
    if angles is None or angles.size != field.size or {angles.directions, field.directions} != {1}:
        raise RecipeError(
            "combine: expected one row and its angles over the same positions for the form slerp"
        )
    return field.refine(angles.boundaries)


def _arc_weights(field: Field, angles: Field | None) -> npt.NDArray[np.float64]:
    """Weights of base and row on the arc: ``(2, segments)``.

    An angle of 0 stands for the straight line.

    Shoemake 1985, "Animating rotation with quaternion curves": sin((1 − t)φ) / sin φ and sin(tφ) /
    sin φ. The ends are exact: t = 0 is the base, t = 1 is the row.
    """
    assert angles is not None
    t = field.values[0]
    angle = angles.at(field.boundaries[:-1])[0]
    straight = (angle == 0) | (t == 0) | (t == 1)
    sine = np.where(straight, 1.0, np.sin(angle))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)  # sin((1 − t)φ) / sin φ
    second = np.where(straight, t, np.sin(t * angle) / sine)  # sin(tφ) / sin φ
    return np.vstack([first, second])


def _check_shapes(base: Array, rows: Sequence[Array], field: Field, out: Array) -> None:
    shape = (field.size,)
    named_rows = ((f"row {k}", row) for k, row in enumerate(rows))
    for name, array in (("base", base), *named_rows, ("out", out)):
        if tuple(array.shape) != shape:
            raise InputError(
                f"combine: expected {name} of shape {shape}, the field's, received "
                f"{tuple(array.shape)}"
            )
    if field.directions != len(rows):
        raise RecipeError(
            f"combine: expected a field of {len(rows)} directions, received {field.directions}"
        )
