"""``combine_spans``: ``combine`` for an arena whose rows are kept as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.kernels.dispatch import default_threads, refined_to_angles, term_weights
from mergesearch.merging.kernels.forms import ELECTIONS, Form
from mergesearch.merging.kernels.host import dtype_name, host_bytes
from mergesearch.merging.kernels.spans import Ranges, Span
from mergesearch.merging.kernels.spans_decode import is_wide
from mergesearch.merging.kernels.triton_blocks import Tables, usable
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array

SpanKernel = Literal["auto", "numba", "triton", "torch"]

#: dtypes that the compiled kernels write.
_WRITTEN = ("float32", "bfloat16", "float16")


def combine_spans(
    memory: Array,
    spans: Sequence[Span],
    field: Field,
    form: Form,
    out: Array,
    *,
    angles: Field | None = None,
    threads: int | None = None,
    kernel: SpanKernel = "auto",
    tables: Tables | None = None,
    only: Ranges | None = None,
) -> None:
    """Write the weighted sum of base and rows into ``out``.

    The result is that of :func:`mergesearch.merging.kernels.combine` on the rows that the spans
    stand for, to the bit. Positions that no span has are left as they are.

    Args:
        memory: The arena, ``(bytes,)``, uint8: numpy array, memmap or torch tensor.
        spans: In the order of the flat index.
        field: Coefficients ``(K, segments)`` over n positions.
        form: How base and rows combine.
        out: ``(n,)``, where the arena is.
        angles: For ``slerp``: the angle between base and row over the positions, one direction.
        threads: Number of CPU threads; None takes ``OMP_NUM_THREADS``, or 1.
        kernel: ``auto`` takes numba in main memory and Triton on a CUDA device, where dtypes and
            packages allow them, else torch.
        tables: What kernels keep between merges of the same spans.
        only: Positions that are written, where these are not all; others are left as they are. Not
            by Triton, whose tables would have to be made and copied to the card for each merge.

    Raises:
        RecipeError: If the field does not fit the spans.
        InputError: If the arrays do not fit each other, or a kernel is asked for what it cannot do.
    """
    _check(memory, spans, field, out)
    if form == "slerp":
        field = refined_to_angles(field, angles)
    wide = is_wide(spans) or dtype_name(out) == "float64"
    weights = term_weights(field, form, np.float64 if wide else np.float32, angles)
    election = form if form in ELECTIONS else ""
    chosen = chosen_kernel(memory, out, wide, kernel)
    if chosen == "triton":
        if only is not None:
            raise InputError(
                "combine_spans: expected all positions on a GPU, received some; leave only out"
            )
        from mergesearch.merging.kernels import triton_combine
        from mergesearch.merging.kernels.torch_kernel import as_tensor

        triton_combine.combine(
            as_tensor(memory),
            spans,
            weights,
            field.boundaries,
            as_tensor(out),
            election,
            tables=tables,
        )
        return
    threads = default_threads() if threads is None else threads
    host = host_bytes(memory)
    if chosen == "numba" and host is not None:
        from mergesearch.merging.kernels import spans_numba

        spans_numba.combine(
            host, spans, weights, field.boundaries, out, threads, election, only, tables
        )
    else:
        from mergesearch.merging.kernels import spans_torch
        from mergesearch.merging.kernels.torch_kernel import as_tensor

        arena = as_tensor(memory)
        spans_torch.combine(arena, spans, weights, field.boundaries, out, threads, election, only)


def chosen_kernel(memory: Array, out: Array, wide: bool, kernel: SpanKernel) -> SpanKernel:
    """The kernel that merges these arrays.

    Raises:
        InputError: If it is asked for by name and cannot.
    """
    place = device_type(memory)
    narrow = not wide and dtype_name(out) in _WRITTEN
    able: dict[SpanKernel, bool] = {
        "numba": narrow and place == "cpu",
        "triton": narrow and runs_on_triton(memory),
        "torch": True,
    }
    if kernel == "auto":
        return next(name for name, can in able.items() if can)
    if not able[kernel]:
        raise InputError(
            f"combine_spans: kernel {kernel!r} cannot merge into {dtype_name(out)} on {place}; use "
            "kernel='auto'"
        )
    return kernel


def runs_on_triton(memory: Array) -> bool:
    """Whether the Triton kernels read this arena: one on a GPU that they are compiled for."""
    return (
        not isinstance(memory, np.ndarray)
        and memory.device.type == "cuda"
        and usable(memory.device)
    )


def device_type(array: Array) -> str:
    """``cpu`` for numpy arrays and tensors in main memory, else the type of the device."""
    return "cpu" if isinstance(array, np.ndarray) else str(array.device.type)


def _check(memory: Array, spans: Sequence[Span], field: Field, out: Array) -> None:
    if dtype_name(memory) != "uint8" or len(memory.shape) != 1:
        raise InputError(
            f"combine_spans: expected an arena of bytes, uint8 (bytes,), received "
            f"{dtype_name(memory)} {tuple(memory.shape)}"
        )
    if tuple(out.shape) != (field.size,) or not _is_contiguous(out):
        raise InputError(
            f"combine_spans: expected a contiguous out of shape {(field.size,)}, the field's, "
            f"received {tuple(out.shape)}"
        )
    if device_type(memory) != device_type(out):
        raise InputError(
            f"combine_spans: expected arena and out in one place, received {device_type(memory)} "
            f"and {device_type(out)}"
        )
    end = 0
    directions = field.directions
    size = field.size
    for span in spans:
        if len(span.rows) != directions:
            raise RecipeError(
                f"combine_spans: expected a field of {len(span.rows)} directions, received "
                f"{directions}"
            )
        if span.start < end or span.stop > size:
            raise InputError(
                f"combine_spans: expected spans in order within {size} positions, received "
                f"one of {span.start}:{span.stop} after position {end}"
            )
        end = span.stop


def _is_contiguous(array: Array) -> bool:
    if isinstance(array, np.ndarray):
        return bool(array.flags.c_contiguous)
    return array.is_contiguous()
