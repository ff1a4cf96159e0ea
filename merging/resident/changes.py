"""How much experts change each tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.parallel import parallel_map
from mergesearch.merging.tensors.source import remembered


def change_sums(family: ModelFamily, threads: int = 1) -> npt.NDArray[np.float64]:
    """Σ |expert − base| of every expert and tensor of the layout: ``(K, tensors)``.

    Reads all weights once.

    With a memo the sums are kept, and the weights are read only the first time.
    """
    import torch

    sources = (family.base, *family.experts)
    names = family.layout.names

    def of_tensor(name: str) -> list[float]:
        return [
            float(v.abs().sum(dtype=torch.float64))
            for v in task_vectors(family.base, family.experts, name)
        ]

    def compute() -> dict[str, torch.Tensor]:
        return {
            "sums": torch.tensor(
                list(parallel_map(of_tensor, names, threads)), dtype=torch.float64
            ).T
        }

    sums: npt.NDArray[np.float64] = remembered(
        sources, ["change sums", family.layout.digest], compute
    )["sums"].numpy()
    return sums
