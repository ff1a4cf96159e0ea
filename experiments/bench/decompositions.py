"""TSV's decompositions: through whole singular value decompositions, and as they are done.

``python -m experiments.bench.decompositions [ROWSxCOLUMNS ...]``, in CPU seconds of one thread. The
default shapes take about ten minutes; of two shapes the time for an 8B model with four experts
follows. Task vectors are random, with singular values that fall like those of fine-tuning: some
large ones before a flat rest, the worst case for anything truncated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from mergesearch.merging.operators.parts import decomposition
from mergesearch.merging.operators.parts.decomposition import decompose
from mergesearch.merging.operators.tsv import orthogonalised

EXPERTS = 4
SHAPES = ((2048, 2048), (4096, 11008))

#: Llama 3 8B: how often it has matrices of these shapes.
MATRICES_8B = {
    (4096, 4096): 64,
    (1024, 4096): 64,
    (14336, 4096): 96,
    (128256, 4096): 2,
}


def task_vectors(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Four random task vectors with twenty singular values above those of noise."""
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    vectors = []
    for _ in range(EXPERTS):
        noise = torch.randn(shape, generator=generator) / max(shape) ** 0.5
        left = torch.randn((m, 20), generator=generator) / m**0.5
        right = torch.randn((20, n), generator=generator) / n**0.5
        strengths = 20 / torch.arange(1.0, 21.0)
        vectors.append(noise + left * strengths @ right)
    return vectors


def merged_rows(vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """TSV's rows, in fp32."""
    rank = min(vectors[0].shape) // EXPERTS
    svds = [
        decompose(vector, rank, torch.Generator().manual_seed(k))
        for k, vector in enumerate(vectors)
    ]
    return orthogonalised(svds, torch.float32)


def timed(vectors: Sequence[torch.Tensor], up_to: int) -> tuple[list[torch.Tensor], float]:
    """The rows, and CPU seconds; matrices of up to so many elements go the long way."""
    before = decomposition.PRECISE_UP_TO
    decomposition.PRECISE_UP_TO = up_to
    began = time.process_time()
    try:
        return merged_rows(vectors), time.process_time() - began
    finally:
        decomposition.PRECISE_UP_TO = before


def hours_of_8b(seconds: dict[tuple[int, int], float]) -> float:
    """CPU hours for a whole model, from ``a s³ + b s² l`` through the seconds of two shapes."""
    parts = np.array([_parts(shape) for shape in seconds])
    factors = np.linalg.solve(parts, list(seconds.values()))
    counts = np.array([*MATRICES_8B.values()])
    return float(counts @ np.array([_parts(shape) for shape in MATRICES_8B]) @ factors) / 3600


def _parts(shape: tuple[int, int]) -> tuple[float, float]:
    s, length = sorted(shape)
    return float(s) ** 3, float(s) ** 2 * length


def main(shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
    """Print times, errors and what follows for a model."""
    torch.set_num_threads(1)
    whole = {}
    own = {}
    for shape in shapes:
        vectors = task_vectors(shape)
        rows, own[shape] = timed(vectors, decomposition.PRECISE_UP_TO)
        reference, whole[shape] = timed(vectors, 1 << 60)
        error = max(
            float((row - other).norm() / other.norm())
            for row, other in zip(rows, reference, strict=True)
        )
        print(
            f"tsv of {EXPERTS} x {shape[0]} x {shape[1]}: whole SVDs {whole[shape]:.1f} s, "
            f"now {own[shape]:.1f} s ({whole[shape] / own[shape]:.1f} times faster), relative "
            f"difference {error:.1e}",
            flush=True,
        )
    if len({_parts(shape)[0] for shape in shapes}) == 2 == len(shapes):
        print(
            f"8B x {EXPERTS}: {hours_of_8b(whole):.1f} CPU hours with whole SVDs, "
            f"{hours_of_8b(own):.1f} now"
        )


if __name__ == "__main__":
    main([(int(m), int(n)) for m, n in (a.split("x") for a in sys.argv[1:])] or SHAPES)
