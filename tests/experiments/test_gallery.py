"""The recipes of docs/gallery.md: the page shows them, and their merges score what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergesearch.search.plan.loading import load_study
from mergesearch.search.runs.replay.replaying import replay
from mergesearch.search.runs.replay.sources import open_source

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gallery.md").read_text()
FOLDERS = sorted(path.parent for path in (ROOT / "docs" / "gallery").glob("*/recipe.yaml"))
ROW = re.compile(r"^\| \[(\w+)\]\(.*?\) \|.*?\|.*?\| ([\d.]+) ± ([\d.]+) \|", re.MULTILINE)
SCORES = {name: (float(value), float(error)) for name, value, error in ROW.findall(PAGE)}


def test_every_recipe_has_a_score() -> None:
    assert [folder.name for folder in FOLDERS] == sorted(SCORES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_page_shows_the_recipe_and_its_study_is_valid(folder: Path) -> None:
    assert f"```yaml\n{(folder / 'recipe.yaml').read_text()}```" in PAGE
    assert load_study(folder / "study.yaml").name == f"gallery-{folder.name}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_merge_scores_what_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.e0011_operator_auto import RUNS, ZOO_STUDIES

    zoo = ROOT / "zoo" / folder.name
    if not (zoo / "manifest.json").is_file():
        pytest.skip(f"expected a zoo in {zoo}; `python -m experiments.zoo.{folder.name}` makes it")
    monkeypatch.chdir(ROOT)
    if folder.name in ZOO_STUDIES:  # items that RegMean runs the experts on, unless they are there
        ZOO_STUDIES[folder.name].calibration(zoo, RUNS / "calibration" / folder.name)
    scores = replay(open_source(folder, None), folder / "study.yaml").scores
    assert scores is not None
    (value,) = scores.values.values()
    expected, error = SCORES[folder.name]
    # Zoos that other machines trained differ in their last bits.
    assert value == pytest.approx(expected, abs=error)
