"""How much experts change each tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from merging.family import Family
from merging.memo import remembered
from merging.operators.task_vectors import task_vectors
from merging.streaming import each


def change_sums(family: Family, threads: int = 1) -> npt.NDArray[np.float64]:
    """Σ |expert − base| of every expert and tensor of the layout ``(K, tensors)``; reads all weights once.

    With a memo the sums are kept, and the weights are read only the first time.
    """
    import torch

    sources = (family.base, *family.experts)
    names = family.layout.names

    def of_tensor(name: str) -> list[float]:
        return [float(v.abs().sum(dtype=torch.float64)) for v in task_vectors(family.base, family.experts, name)]

    def compute() -> dict[str, torch.Tensor]:
        return {"sums": torch.tensor(list(each(of_tensor, names, threads)), dtype=torch.float64).T}

    found: npt.NDArray[np.float64] = remembered(sources, ["change sums", family.layout.digest], compute)["sums"].numpy()
    return found
