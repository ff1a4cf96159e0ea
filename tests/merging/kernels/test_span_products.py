"""Inner products with stored rows: the bits of ``products`` on the rows that they decode to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.kernels.forms import Kernel
from mergesearch.merging.kernels.products import PIECE, products
from mergesearch.merging.kernels.products_spans import span_products
from mergesearch.merging.kernels.spans_decode import read
from tests.merging.kernels import span_reference as reference
from tests.merging.kernels.span_reference import Row, Stretch

KERNELS: tuple[Kernel, ...] = ("numba", "torch")
STORED = Row("bfloat16", minus_base=True)
PACKED = Row("bfloat16", minus_base=True, masked=True, packed=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [(Row("float32"),) * 2, (PACKED, Row("int8", masked=True))])
def test_products_have_the_bits_of_decoded_rows(kernel: Kernel, rows: tuple[Row, ...]) -> None:
    generator = np.random.default_rng(0)
    # Spans that follow each other without a gap, the first over more than one piece.
    sizes = (PIECE + 64 * 33, 64, 5000)
    stretches = [Stretch(size, "bfloat16", rows) for size in sizes]
    memory, spans = reference.random_arena(generator, stretches)
    size = spans[-1].stop
    vector = generator.standard_normal(size, dtype=np.float32)
    boundaries = np.array([0, 777, PIECE // 2, PIECE + 64 * 33, size])
    base, decoded = read(memory, spans, 0, size)
    for origin, from_base in ((None, False), (base, False), (base, True)):
        expected = products(
            vector, decoded, boundaries, base=origin, from_base=from_base, kernel=kernel
        )
        for threads in (1, 2):
            result = span_products(
                memory,
                spans,
                vector,
                boundaries,
                base=origin is not None,
                from_base=from_base,
                kernel=kernel,
                threads=threads,
            )
            assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_positions_between_spans_add_nothing(kernel: Kernel) -> None:
    generator = np.random.default_rng(1)
    memory, spans = reference.random_arena(
        generator, [Stretch(100, "float32", (STORED,)), Stretch(30, "float16", (STORED,))]
    )
    vector = torch.full((200,), torch.nan)
    for span in spans:
        vector[span.start : span.stop] = 1
    boundaries = np.array([0, 50, 110, 140, 200])
    result = span_products(memory, spans, vector, boundaries, base=True, kernel=kernel)
    vector[vector != 1] = 0
    base, rows = read(memory, spans, 0, 200)
    np.testing.assert_allclose(result, products(vector, [base, *rows], boundaries), rtol=1e-12)


def test_refuses_what_does_not_fit() -> None:
    memory, spans = reference.random_arena(
        np.random.default_rng(2), [Stretch(100, "float64", (Row("float64"),))]
    )
    vector = np.ones(100, np.float32)
    with pytest.raises(InputError, match=r"expected a vector of shape \(99,\)"):
        span_products(memory, spans, vector, np.array([0, 99]))
    with pytest.raises(InputError, match="kernel 'numba' expects an arena and a contiguous"):
        span_products(memory, spans, vector, np.array([0, 100]), kernel="numba")
    base, rows = read(memory, spans, 0, 100)
    result = span_products(memory, spans, vector, np.array([0, 100]), base=True)
    np.testing.assert_allclose(result[:, 0], [base.sum(), rows.sum()], rtol=1e-12)
