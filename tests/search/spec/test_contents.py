"""Digests of evaluations, which go by what lies at paths rather than by the paths."""

from __future__ import annotations

import shutil
from pathlib import Path

from mergesearch.search.spec.comparison import evaluation_digest, scored_alike
from mergesearch.search.spec.contents import without_places
from tests.search.conftest import model_study
from tests.search.studies import spec_of


def digest(folder: Path, items: Path, models: Path) -> str:
    return evaluation_digest(spec_of(model_study(models, items), folder))


def test_moved_data_are_the_same_data(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    first = digest(tmp_path, pico_items, pico_models)
    moved = tmp_path / "elsewhere"
    shutil.copytree(pico_items, moved)
    second = digest(tmp_path, moved, pico_models)
    assert first != second
    assert scored_alike(first, second)
    arrow = next((moved / "test").glob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[-40] ^= 1
    arrow.write_bytes(content)
    assert not scored_alike(first, digest(tmp_path, moved, pico_models))


def test_digests_of_earlier_versions_go_by_places(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    first = digest(tmp_path, pico_items, pico_models)
    earlier, _ = first.split("-")
    assert len(earlier) == 16
    assert scored_alike(earlier, first)
    shutil.copytree(pico_items, tmp_path / "elsewhere")
    assert not scored_alike(earlier, digest(tmp_path, tmp_path / "elsewhere", pico_models))


def test_what_is_replaced(tmp_path: Path) -> None:
    table = tmp_path / "items.csv"
    table.write_text("text\na\n")
    other = tmp_path / "renamed.csv"
    shutil.copy(table, other)

    def section(path: Path) -> dict[str, object]:
        return {
            "data": {"file": {"books": str(path)}, "split": "test", "processor": "org/name"},
            "function": f"{path.parent}/judge.py:score",
            "source": {f"{path.parent}/judge.py:score": "abc"},
            "label": "data",
        }

    [found] = without_places([section(table)])
    assert without_places([section(other)]) == [found]
    assert found["data"]["file"]["books"].startswith("content:")
    assert found["data"]["processor"] == "org/name"
    assert found["function"] == "judge.py:score"
    assert found["source"] == {"judge.py:score": "abc"}
    missing = section(tmp_path / "gone.csv")
    [kept] = without_places([missing])
    assert kept["data"] == missing["data"]
