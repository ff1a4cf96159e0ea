"""Scalars that are merged as logarithms: temperatures and scales that are positive everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.family.aligned import Make, unstored, with_tensors
from mergesearch.merging.family.messages import listed, warn
from mergesearch.merging.family.special_tensors import in_log_space, is_logarithm
from mergesearch.merging.tensors.layout import natural_key

if TYPE_CHECKING:
    import torch


def with_logarithms(sources: Sequence[Checkpoint]) -> tuple[list[Checkpoint], frozenset[str]]:
    """Sources whose experts give positive scalars in log space, and the names of these scalars.

    Reads the scalars.
    """
    base = sources[0]
    scalars = [n for n, (shape, _) in base.merged.items() if not shape and not is_logarithm(n)]
    logs = frozenset(positive_scalars({n: [source.read(n) for source in sources] for n in scalars}))
    wide = {
        n: "float64" if any(s.merged[n][1] == "float64" for s in sources) else "float32"
        for n in logs
    }
    made = [
        {n: (unstored(e, (), wide[n]), _logarithm(e, base, n)) for n in logs} for e in sources[1:]
    ]
    experts = [
        with_tensors(e, m, done="log", beside=[base])
        for e, m in zip(sources[1:], made, strict=True)
    ]
    return [base, *experts], logs


def positive_scalars(values: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """Names of the scalars that are positive in every source.

    The others have no logarithm; there is a warning that names them.
    """
    positive = [
        name for name, tensors in values.items() if all(bool(tensor > 0) for tensor in tensors)
    ]
    others = sorted(set(values) - set(positive), key=natural_key)
    warn(
        f"scalars: {listed(others)} are not positive everywhere and are merged as they are"
        if others
        else None
    )
    return positive


def _logarithm(expert: Checkpoint, base: Checkpoint, name: str) -> Make:
    return lambda: in_log_space(expert.read(name), base.read(name))
