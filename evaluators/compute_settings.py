"""Settings of torch on which bits depend, chosen here and nowhere else.

The device that a worker records (``environment.json``) has them as ``tf32`` and ``deterministic``.
"""

from __future__ import annotations

import os

#: Memory that cuBLAS may use, where its results must not depend on what runs beside it.
CUBLAS_WORKSPACE = ":4096:8"


def fix_compute_settings() -> None:
    """Compute in the stated precision and in a fixed order, on cards.

    fp32 products are not rounded to TF32, because differences between merges are often smaller than
    that. Operations with a deterministic form take it; the others warn and run, as scores from them
    are better than none. The CPU computes the same without any of this.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
