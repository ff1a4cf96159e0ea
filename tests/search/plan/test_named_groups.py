"""Named groups of a study file: coordinates of its space, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergesearch.merging import InputError
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from tests.search.conftest import model_study


def study(folder: Path, models: Path, items: Path, groups: dict[str, str]) -> Path:
    file = folder / "study.yaml"
    space = {"granularity": "task", "groups": groups}
    file.write_text(yaml.safe_dump(model_study(models, items, space=space)))
    return file


def test_groups_of_a_study_are_coordinates(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    file = study(tmp_path, pico_models, pico_items, {"mlps": "*.intermediate.*", "head": "class.*"})
    plan = plan_study(load_study(file), None)
    assert plan.space.names == tuple(
        f"{expert}/{group}" for expert in ("left", "right") for group in ("head", "mlps", "others")
    )


def test_a_pattern_that_matches_nothing_is_refused(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    file = study(tmp_path, pico_models, pico_items, {"mlps": "*.mpl.*"})
    with pytest.raises(InputError, match=r"space.groups.mlps: '\*.mpl.\*' matches none of the "):
        plan_study(load_study(file), None)
