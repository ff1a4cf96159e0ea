"""A merge of checkpoints that are holes, where only bytes matter: from headers to merged weights.

``python -m experiments.growth.sparse PARAMETERS EXPERTS`` prints its figures as a line of JSON.
Files that are holes take no place on the disk and read as zeros; the arena that is prepared of them
does take place, beside the temporary files.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.growth.process import anonymous_mb
from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.shard import whole_shard
from mergesearch.merging.resident.terms import Terms, combine_terms
from tests.headers import Shapes, write_sparse

#: Columns of every matrix, and matrices of a model.
COLUMNS = 1024
TENSORS = 100
MERGES = 4


def measure(parameters: int, experts: int, folder: Path) -> dict[str, float]:
    """Seconds of every step, sizes, and anonymous memory that the steps took."""
    rows = max(parameters // (TENSORS * COLUMNS), 1)
    shapes: Shapes = {
        f"model.layers.{i}.mlp.up_proj.weight": (rows, COLUMNS) for i in range(TENSORS)
    }
    names = ["base", *(f"expert{k}" for k in range(experts))]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        write_sparse(folder / name / "model.safetensors", shapes)
    sources = [Source(name, str(folder / name)) for name in names]
    recipe = Recipe(sources[0], tuple(sources[1:]), "task_arithmetic", Field.constant(1, [0.0]))
    before = anonymous_mb()
    headers = _seconds(lambda: open_family(recipe))
    prepare = _seconds(lambda: open_arenas(recipe, folder / "arenas"))
    start = time.perf_counter()
    arenas = open_arenas(recipe, folder / "arenas", verify=False)
    again = time.perf_counter() - start
    opened = anonymous_mb()
    shard = whole_shard(Terms.of(arenas), "cpu", torch.bfloat16)
    field = Field.constant(arenas.layout.size, [0.3] * experts)
    merges = [
        _seconds(lambda: combine_terms(shard.terms, field, shard.merged, threads=1), cpu=True)
        for _ in range(MERGES)
    ]
    return {
        "parameters": TENSORS * rows * COLUMNS,
        "experts": experts,
        "headers_seconds": headers,
        "prepare_seconds": prepare,
        "open_seconds": again,
        "arena_mb": arenas.memory.nbytes / 1e6,
        "merge_seconds": min(merges),
        "opened_mb": opened - before,
        "merged_mb": anonymous_mb() - opened,
    }


def _seconds(step: Callable[[], object], *, cpu: bool = False) -> float:
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    step()
    return clock() - start


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    parameters, experts = (int(word) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        measure(TENSORS * COLUMNS, experts, Path(warm))  # imports, and kernels from their cache
        print(json.dumps(measure(parameters, experts, Path(folder))))


if __name__ == "__main__":
    main()
