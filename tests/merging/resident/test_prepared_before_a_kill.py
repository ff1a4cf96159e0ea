"""What was prepared before a process was killed is used by the next one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.operators import fisher
from mergesearch.merging.resident.arena import open_arenas
from tests.merging.operators.calibrated import save_items
from tests.merging.resident.test_arena import _OPEN, start
from tests.waiting import PATIENT

#: Dies when it begins with its second expert.
_DIES = """
import os
from mergesearch.merging.operators import fisher
information = fisher._information
begun = []
def dying(runner, expert, *rest):
    begun.append(expert.name)
    if len(begun) == 2:
        os.kill(os.getpid(), 9)
    return information(runner, expert, *rest)
fisher._information = dying
"""


@pytest.mark.slow
def test_statistics_of_an_expert_are_not_collected_again_after_a_kill(
    pico: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = pico("vit")
    recipe = fisher_recipe(family, tmp_path)
    killed = start(recipe, tmp_path / "arenas", _DIES + _OPEN)
    assert killed.wait(timeout=PATIENT) == -signal.SIGKILL
    kept = written(tmp_path)
    assert kept, "the first expert's statistics are on disk"
    collected: list[str] = []
    information = fisher._information

    def noting(runner: Any, expert: Any, *rest: Any) -> Any:
        collected.append(expert.name)
        return information(runner, expert, *rest)

    monkeypatch.setattr(fisher, "_information", noting)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    assert collected == [family.experts[1].name]
    assert kept.items() <= written(tmp_path).items(), "and were not written again"
    monkeypatch.setattr(fisher, "_information", information)
    undisturbed = open_arenas(recipe, tmp_path / "undisturbed")
    assert np.array_equal(arenas.memory, undisturbed.memory)


def fisher_recipe(family: Any, folder: Path) -> Recipe:
    """Fisher merging of a family of vision models, on a few items."""
    config = json.loads((family.base / "config.json").read_text())
    shape = (4, config["num_channels"], config["image_size"], config["image_size"])
    pixels = np.random.default_rng(0).random(shape).astype("float32")
    items = save_items(folder / "items", {"pixels": pixels.tolist()})
    calibration = {
        "data": str(items),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    experts = tuple(Source(path.name, str(path)) for path in family.experts)
    field = Field.constant(1, [0.0] * len(experts))
    return Recipe(
        Source("base", str(family.base)), experts, "fisher", field, {"calibration": calibration}
    )


def written(folder: Path) -> dict[str, int]:
    """Intermediate results on disk and when they were written."""
    files = (folder / "arenas" / "shared").glob("*.safetensors")
    return {file.name: file.stat().st_mtime_ns for file in files}
