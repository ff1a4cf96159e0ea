"""Merging checkpoints that do not fit in memory, under a limit that the system enforces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging.operators import get_operator
from mergesearch.merging.tensors.parallel import parallel_map, run_single_threaded

TENSORS, SIDE = 64, 1024  # 64 tensors of 2 MB in bf16, 4 MB in fp32

#: The command, after everything has been imported and compiled, with no more memory than the
#: allowance in megabytes.
LIMITED = """
import re, resource, sys
from pathlib import Path
from mergesearch.search.cli.main import app
small, recipe, out, allowance = sys.argv[1:]
def merge(recipe, out):
    random = ["--allow-unrelated", "random matrices"]
    app(["merge", recipe, "--out", out, "--threads", "2", *random], standalone_mode=False)
merge(small, out + "-small")
used = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
limit = used + int(allowance) * 1_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
merge(recipe, out)
"""


def write_family(folder: Path, tensors: int, side: int) -> Path:
    """A base, two experts and a recipe over them; returns the recipe without its operator."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two"):
        (folder / name).mkdir(parents=True)
        matrices = (torch.randn(side, side, generator=generator) for _ in range(tensors))
        state = {f"layers.{i}.weight": matrix.bfloat16() for i, matrix in enumerate(matrices)}
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text("base: base\nexperts: [one, two]\n")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("larger_than_memory")
    return write_family(folder / "small", 2, SIDE), write_family(folder / "large", TENSORS, SIDE)


@pytest.mark.parametrize(
    "operator", [pytest.param("task_arithmetic", marks=pytest.mark.slow), "ties"]
)
def test_a_checkpoint_larger_than_memory_merges(
    families: tuple[Path, Path], tmp_path: Path, operator: str
) -> None:
    recipes = []
    for family in families:
        recipes.append(family.with_name(f"{operator}.yaml"))
        recipes[-1].write_text(family.read_text() + f"operator: {operator}\n")
    # Two threads, each with the stated working set, the merged tensor and its rounding; as much
    # again, and 100 MB, for what stacks take and the allocator keeps of freed memory.
    working_set = 2 * (get_operator(operator).copies(2) + 3) * SIDE**2 * 4
    allowance = round(2 * working_set / 1e6) + 100
    assert allowance * 1e6 < 3 * TENSORS * SIDE**2 * 2  # the three checkpoints do not fit
    arguments = [*map(str, recipes), str(tmp_path / "out"), str(allowance)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > TENSORS * SIDE**2 * 2


def test_each_keeps_the_order_and_takes_one_torch_thread() -> None:
    before = torch.get_num_threads()
    results = list(parallel_map(lambda item: (item, torch.get_num_threads()), range(9), threads=3))
    assert results == [(item, 1) for item in range(9)]
    assert run_single_threaded(torch.get_num_threads) == 1
    assert torch.get_num_threads() == before


def test_each_raises_what_the_work_raises_and_takes_no_further_items() -> None:
    taken = []

    def work(item: int) -> int:
        taken.append(item)
        return 1 // (item - 2)

    with pytest.raises(ZeroDivisionError):
        list(parallel_map(work, range(100), threads=2))
    assert max(taken) < 6
