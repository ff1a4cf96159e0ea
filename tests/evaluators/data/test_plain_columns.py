"""Plain columns are what ``datasets`` gives, and are read without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.data.datasets_items import _by_datasets, load_datasets
from mergesearch.evaluators.data.plain_columns import plain_columns

ROWS = 7
#: Columns that are read here as arrays, as lists, or in neither way.
ARRAYS = ("square", "picture", "label", "small", "double", "half", "text", "tokens", "pairs")
LISTS = ("label", "small", "text", "tokens", "words", "marks", "gaps", "short")
NEITHER = ("flag", "fixed", "nested")


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "three files"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, List, Value

    rng = np.random.default_rng(0)
    names = ClassLabel(names=["a", "b", "c"])
    columns: dict[str, tuple[Any, Any]] = {
        "square": (Array2D((4, 3), "float32"), rng.normal(size=(ROWS, 4, 3)).astype("f4")),
        "picture": (Array3D((2, 4, 3), "uint8"), rng.integers(0, 255, (ROWS, 2, 4, 3), "u1")),
        "label": (names, rng.integers(0, 3, ROWS)),
        "small": (Value("int32"), rng.integers(0, 9, ROWS)),
        "double": (Value("float64"), rng.normal(size=ROWS)),
        "half": (Value("float16"), rng.normal(size=ROWS).astype("f2")),
        "text": (Value("string"), ["é" * n for n in range(ROWS)]),
        "tokens": (List(Value("int64")), [[*range(n + 1)] for n in range(ROWS)]),
        "pairs": (List(Value("int32")), [[n, 1] for n in range(ROWS)]),
        "words": (List(Value("string")), [["x"] * n for n in range(ROWS)]),
        "marks": (List(names), [[0] * n for n in range(ROWS)]),
        "gaps": (Value("int64"), [None, *range(ROWS - 1)]),
        "short": (List(Value("int64")), [[*range(n)] for n in range(ROWS)]),
        "flag": (Value("bool"), [True] * ROWS),
        "fixed": (List(Value("float32"), length=2), [[1.0, 2.0]] * ROWS),
        "nested": (List(List(Value("int64"))), [[[1], [2]]] * ROWS),
    }
    made = Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()},
        features=Features({name: feature for name, (feature, _) in columns.items()}),
    )
    path = tmp_path_factory.mktemp("plain") / "split"
    made.save_to_disk(path, num_shards=request.param)
    return path


def check_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if not isinstance(theirs, np.ndarray):
        assert ours == theirs
        return
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if theirs.dtype != object:
        np.testing.assert_array_equal(ours, theirs)
        return
    for one, other in zip(ours, theirs, strict=True):
        check_equal(one, other)


@pytest.mark.parametrize("column", ARRAYS)
def test_arrays_are_those_of_datasets(folder: Path, column: str) -> None:
    plain = plain_columns(folder, {column}, set())
    assert plain is not None
    check_equal(plain[0][column], _by_datasets(folder, {"input": column}, {})["input"])


@pytest.mark.parametrize("column", LISTS)
def test_lists_are_those_of_datasets(folder: Path, column: str) -> None:
    plain = plain_columns(folder, set(), {column})
    assert plain is not None
    check_equal(plain[1][column], _by_datasets(folder, {}, {"text": column})["text"])


@pytest.mark.parametrize("column", [*NEITHER, "gaps", "short", "words", "absent"])
def test_datasets_is_asked_for_the_rest(folder: Path, column: str) -> None:
    assert plain_columns(folder, {column}, set()) is None


@pytest.mark.parametrize("column", [*NEITHER, "square", "absent"])
def test_datasets_is_asked_for_the_rest_of_the_lists(folder: Path, column: str) -> None:
    assert plain_columns(folder, set(), {column}) is None


def test_a_saved_format_is_left_to_datasets(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"small": [1, 2]}).with_format("torch").save_to_disk(tmp_path / "split")
    assert json.loads((tmp_path / "split/state.json").read_text())["_format_type"] == "torch"
    assert plain_columns(tmp_path / "split", {"small"}, set()) is None


def test_domains_have_their_names(folder: Path) -> None:
    columns = {"domain": "label", "input": "square", "id": "text", "words": "words"}
    loaded = load_datasets(folder, columns)
    arrays = {role: column for role, column in columns.items() if role != "words"}
    expected = _by_datasets(folder, arrays, {"words": "words"})
    assert loaded.keys() == expected.keys()
    for role, values in loaded.items():
        check_equal(values, expected[role])


def test_they_are_read_without_datasets_and_pandas(folder: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mergesearch.evaluators.data.datasets_items import load_datasets\n"
        "columns = {'input': 'square', 'label': 'label', 'id': 'text', 'words': 'tokens'}\n"
        "load_datasets(Path(sys.argv[1]), columns)\n"
        "unwanted = {'datasets', 'pandas', 'torch', 'pyarrow.compute'} & {*sys.modules}\n"
        "assert not unwanted, unwanted\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
