"""One weighted sum over the flat index: the whole cost of a trial.

``combine`` reads the base and K rows once and writes the merged weights once. Two kernels, the same
bits: numba for contiguous fp32 in main memory, blocked torch for everything else (other dtypes,
other devices).

What makes the bits the same for every kernel, chunk size and number of threads: coefficients are
worked out in float64 and rounded once to the accumulation dtype; terms are added in the fixed order
base, 0, ..., K-1; each is a multiplication and then an addition, never fused; terms whose
coefficient is 0 are left out.
"""

from __future__ import annotations

from mergesearch.merging.kernels.dispatch import (
    accumulation_dtype,
    combine,
    default_threads,
    term_weights,
)
from mergesearch.merging.kernels.forms import ELECTIONS, FORMS, Election, Form, Kernel

__all__ = [
    "ELECTIONS",
    "FORMS",
    "Election",
    "Form",
    "Kernel",
    "accumulation_dtype",
    "combine",
    "default_threads",
    "term_weights",
]
