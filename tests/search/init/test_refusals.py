"""What `mergesearch init` refuses, each in one line that says the next step; nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.search.cli.test_cli import mergesearch, refused
from tests.search.init.journeys import NAMES, make_pictures, reviews, write_csv


@pytest.fixture
def here(tmp_path: Path, reviewers: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models`` and ``good.csv``, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(reviewers)
    write_csv(tmp_path / "good.csv", reviews("books", 40, 1))
    return tmp_path


ALL = ("models/base", "models/books", "models/films")


def message(*arguments: object) -> str:
    """The refusal of ``init``, after which there is no study."""
    before = sorted(Path().iterdir())
    said = refused("init", *arguments, "--no-measure")
    assert sorted(Path().iterdir()) == before
    return said


def column(name: str, values: list[object]) -> str:
    """A table of reviews with one more column."""
    rows = [
        {"review": row["review"], name: value}
        for row, value in zip(reviews("books", 40, 1), values, strict=False)
    ]
    return write_csv(Path("table.csv"), rows).name


class TestData:
    def test_no_column_of_labels(self, here: Path) -> None:
        said = message(*ALL, "--data", column("id", [*range(40)]))
        assert "expected a column of classes, with values among bad, good" in said
        assert "review (text, 40 different), id (integer, 40 different)" in said
        assert said.endswith("name it with --column label=NAME, or add it")

    def test_other_classes_than_the_models_have(self, here: Path) -> None:
        table = column("label", [("awful", "fine")[n % 2] for n in range(40)])
        said = message(*ALL, "--data", table)
        assert "expected classes of the models, bad, good, received awful, fine" in said
        code, *_ = mergesearch(
            "init", *ALL, "--data", table, "--no-measure", "--classes", "awful,fine"
        )
        assert code == 0
        assert "classes: [awful, fine]" in Path("study.yaml").read_text()

    def test_a_wrong_path(self, here: Path) -> None:
        assert "did you mean good.csv?" in message(*ALL, "--data", "god.csv")
        assert message(*ALL, "--data", "elsewhere/x.csv").endswith("check the path")

    def test_pictures_without_classes(self, here: Path) -> None:
        make_pictures(here / "pictures", ("one", "two"), 2)
        loose = here / "pictures" / "one"
        said = message(*ALL, "--data", loose)
        assert "received 2 without" in said
        assert f"{loose}/CLASS/0.png" in said
        assert "expected texts" in message(*ALL, "--data", here / "pictures")

    def test_none_and_two_of_one_name(self, here: Path) -> None:
        assert message(*ALL).endswith("add --data FILE")
        said = message(*ALL, "--data", "good.csv", "--data", "good.csv")
        assert said.endswith("such as --data first=good.csv")

    def test_a_column_that_is_not_there(self, here: Path) -> None:
        said = message(*ALL, "--data", "good.csv", "--column", "label=star")
        assert "did you mean 'stars'?" in said
        said = message(*ALL, "--data", "good.csv", "--column", "lable=stars")
        assert "did you mean 'label'?" in said
        assert "expected ROLE=COLUMN" in message(*ALL, "--data", "good.csv", "--column", "label")


class TestModels:
    def test_experts_without_their_base(self, here: Path) -> None:
        said = message("models/books", "models/films", "--data", "good.csv")
        assert "if both are experts, add --base MODEL" in said
        assert message("models/books", "--data", "good.csv").endswith(
            "add --base MODEL, a folder or org/name"
        )

    def test_the_card_names_a_base_that_is_elsewhere(self, here: Path) -> None:
        for name in ("books", "films"):
            shutil.copytree(here / "models" / name, here / name)
            (here / name / "README.md").write_text("---\nbase_model: someone/bert\n---\n")
        said = message("books", "films", "--data", "good.csv")
        assert said.endswith("cards and configurations name someone/bert: add --base someone/bert")

    def test_the_base_alone(self, here: Path) -> None:
        said = message("models/base", "--base", "models/base", "--data", "good.csv")
        assert said.endswith("received none; add the fine-tuned models")

    def test_other_architectures(self, here: Path, pico_models: Path) -> None:
        said = message(*ALL, pico_models / "left", "--data", "good.csv")
        assert "received " in said
        assert "(bert)" in said
        assert "(vit)" in said
        said = message(ALL[1], pico_models / "left", "--base", ALL[0], "--data", "good.csv")
        assert "to have the tensors of the base models/base" in said

    def test_a_task_of_lm_eval_for_classifiers(self, here: Path) -> None:
        assert "found nothing of that name" in message(*ALL, "--data", "arc_easy")


class TestFiles:
    def test_nothing_is_replaced_unasked(self, here: Path) -> None:
        study = here / "study.yaml"
        study.write_text("mine")
        said = message(*ALL, "--data", "good.csv")
        assert said.endswith("choose another, or add --overwrite")
        assert study.read_text() == "mine"
        arguments = ("init", *ALL, "--data", "good.csv", "--no-measure", "--overwrite")
        assert mergesearch(*arguments)[0] == 0
        assert study.read_text().startswith("# yaml-language-server")

    def test_another_file_with_the_name_of_the_schema(self, here: Path) -> None:
        (here / "study.schema.json").write_text("{}")
        assert "free for the schema" in message(*ALL, "--data", "good.csv")

    def test_a_folder_that_is_not_there(self, here: Path) -> None:
        assert message(*ALL, "--data", "good.csv", "--out", "new/study.yaml").endswith("create it")


def test_classes_that_no_model_names(here: Path, tmp_path: Path) -> None:
    import json

    for name in ("base", "books", "films"):
        shutil.copytree(here / "models" / name, here / name)
        file = here / name / "config.json"
        config = json.loads(file.read_text())
        for key in ("id2label", "label2id"):
            config.pop(key, None)
        file.write_text(json.dumps(config))
    said = message("base", "books", "films", "--data", "good.csv")
    assert said.endswith(f"--classes {','.join(NAMES)}")
