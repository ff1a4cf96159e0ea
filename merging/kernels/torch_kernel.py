"""``combine`` in blocked torch: any floating dtype, any device.

Blocks keep the running sum in the cache on a CPU; on an accelerator they bound the scratch memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: Elements per block: 1 MB of fp32, a second-level cache; an accelerator needs long launches
#: instead.
CPU_BLOCK = 1 << 18
ACCELERATOR_BLOCK = 1 << 24

Array = npt.NDArray[Any] | torch.Tensor


def combine(
    terms: Sequence[Array],
    weights: npt.NDArray[Any],
    boundaries: npt.NDArray[np.int64],
    out: Array,
    threads: int,
    election: str = "",
) -> None:
    """Write ``Σ_t weights[t] · terms[t]`` into ``out`` ``(n,)``; weights are ``(terms, segments)``.

    With an election, the terms after the first are elected instead of summed
    (:data:`mergesearch.merging.kernels.Election`).
    """
    tensors = [as_tensor(term) for term in terms]
    target = as_tensor(out)
    block = CPU_BLOCK if target.device.type == "cpu" else ACCELERATOR_BLOCK
    wide = torch.float64 if weights.dtype == np.float64 else torch.float32
    scratch = torch.empty((2, min(block, target.numel())), dtype=wide, device=target.device)
    with torch.no_grad(), torch_threads(threads):
        for segment, column in enumerate(weights.T.tolist()):
            used = [
                (tensor, weight)
                for tensor, weight in zip(tensors, column, strict=True)
                if weight != 0
            ]
            end = int(boundaries[segment + 1])
            for start in range(int(boundaries[segment]), end, block):
                stop = min(start + block, end)
                blocks = [(tensor[start:stop], weight) for tensor, weight in used]
                if election and len(blocks) > 1:
                    elect_block(blocks, target[start:stop], wide, election)
                else:
                    sum_block(blocks, target[start:stop], scratch[:, : stop - start])


def sum_block(
    terms: Sequence[tuple[torch.Tensor, float]], out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Weighted sum of a block, rounded once to the dtype of ``out``.

    Accumulated in the dtype of ``scratch`` ``(2, block)``.
    """
    total = out if out.dtype == scratch.dtype else scratch[0]
    if not terms:
        total.zero_()
    for index, (tensor, weight) in enumerate(terms):
        scaled = scratch[1] if index else total
        if tensor.dtype == scaled.dtype:
            torch.mul(tensor, weight, out=scaled)
        else:
            scaled.copy_(tensor).mul_(weight)
        if index:
            # A separate addition: add_(alpha=weight) may fuse and round once instead of twice.
            total.add_(scaled)
    if total is not out:
        out.copy_(total)


def elect_block(
    blocks: Sequence[tuple[torch.Tensor, float]],
    out: torch.Tensor,
    wide: torch.dtype,
    election: str,
) -> None:
    """Write the base, which is the first block, plus the election of the others."""
    terms = [tensor.to(wide) * weight for tensor, weight in blocks[1:]]
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    kept = torch.zeros_like(total)
    count = torch.zeros_like(total)
    for (_, weight), term in zip(blocks[1:], terms, strict=True):
        agrees = ((term > 0) & (total > 0)) | ((term < 0) & (total < 0))
        if election == "elect_max":
            kept = torch.where(agrees & (term.abs() > kept.abs()), term, kept)
        else:
            kept.add_(torch.where(agrees, term, 0.0))
            count.add_(agrees, alpha=abs(weight) if election == "elect_weighted" else 1.0)
    if election in ("elect_mean", "elect_weighted"):
        kept.div_(torch.where(count > 0, count, 1.0))
    kept.masked_fill_(~torch.isfinite(total), float("nan"))
    out.copy_(blocks[0][0].to(wide) + kept)


def as_tensor(array: Array) -> torch.Tensor:
    """The array as a detached tensor that shares its memory; read-only memmaps included."""
    if isinstance(array, torch.Tensor):
        return array.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """A context in which torch uses ``threads`` CPU threads; its own number comes back."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
