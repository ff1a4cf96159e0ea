"""Our merges and mergekit's, tensor by tensor, in an environment of its own (`make peers`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging.export.folder import export_model
from mergesearch.merging.mergekit_format.architectures import ARCHITECTURES
from mergesearch.merging.mergekit_format.exporting import FILE
from mergesearch.merging.mergekit_format.importing import import_mergekit
from mergesearch.merging.recipe_file import load_recipe, recipe_text
from mergesearch.spaces.groups import groupings_by_name, groups_by_name
from tests.merging.conftest import stored
from tests.merging.mergekit_format.configurations import CONFIGURATIONS, write_configuration
from tests.merging.mergekit_format.families import save_family
from tests.merging.mergekit_format.test_exporting import EXPRESSIBLE, OTHERWISE, recipe_of

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="needs `make peers`"),
]
#: Of float32: mergekit multiplies and adds in another order.
ROUNDING = 5e-7


def merged_by_mergekit(configurations: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Folders with what mergekit makes of each configuration."""
    folders = {name: out / f"{i}" for i, name in enumerate(configurations)}
    pairs = [str(path) for name in configurations for path in (configurations[name], folders[name])]
    script = ROOT / "tests" / "peers" / "merge_with_mergekit.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(PYTHON), str(script), *pairs], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folders


def difference(one: Path, other: Path) -> float:
    """The largest difference between tensors of two folders, which have the same."""
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def test_exports_say_what_mergekit_makes(pico: Any, tmp_path: Path) -> None:
    cases = [*EXPRESSIBLE, *OTHERWISE]
    names = [f"{i} {case[0]}" for i, case in enumerate(cases)]
    ours = {}
    for name, (operator, field, experts, options) in zip(names, cases, strict=True):
        recipe = recipe_of(pico("llama"), operator, field, experts, **options)
        ours[name] = export_model(recipe, tmp_path / name).folder
    half = recipe_of(pico("llama_bf16"), "task_arithmetic", (0.3, 0.7))
    ours["bfloat16"] = export_model(half, tmp_path / "half").folder
    for architecture in ARCHITECTURES:
        family = save_family(architecture, tmp_path / "models" / architecture)
        recipe = recipe_of(family, "task_arithmetic", (0.3, 0.7))
        ours[architecture] = export_model(recipe, tmp_path / architecture).folder
    theirs = merged_by_mergekit({name: folder / FILE for name, folder in ours.items()}, tmp_path)
    found = {name: difference(folder, theirs[name]) for name, folder in ours.items()}
    half_step = found.pop("bfloat16")
    assert max(found.values()) <= ROUNDING, found
    # One unit in the last place where the two sums in float32 lie on either side of a tie.
    assert half_step <= torch.finfo(torch.bfloat16).eps


def test_imports_are_what_mergekit_makes(pico: Any, tmp_path: Path) -> None:
    family = pico("llama")
    models = {"BASE": family.base, "ONE": family.experts[0], "TWO": family.experts[1]}
    sources = {name: write_configuration(name, tmp_path, models) for name in CONFIGURATIONS}
    theirs = merged_by_mergekit(sources, tmp_path)
    found = {}
    for name, source in sources.items():
        imported = import_mergekit(source, groupings_by_name)
        assert imported.problems == (), name
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe_text(imported.recipe))
        ours = export_model(load_recipe(path, groups_by_name), tmp_path / name).folder
        found[name] = difference(ours, theirs[name])
    assert max(found.values()) <= ROUNDING, found
