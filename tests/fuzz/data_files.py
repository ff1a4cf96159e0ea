"""Damaged items: tables, folders of `datasets`, pictures, and answers of programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Sequence as ListOf
from datasets.utils.logging import disable_progress_bar
from PIL import Image
from pyarrow import parquet

from mergesearch.evaluators.base import Split
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.splits import ItemTables
from mergesearch.evaluators.program_answer import AnswerReader
from mergesearch.merging.models.calibration_experts import check_experts, domains_in
from mergesearch.merging.models.calibration_items import read_items
from mergesearch.merging.models.calibration_prompts import class_names
from mergesearch.merging.models.calibration_spec import DEFAULTS, refuse_calibration
from mergesearch.merging.tensors.layout import Layout
from tests.fuzz.checking import read_or_refuse
from tests.fuzz.mutations import ANY, JSON, JSON_LINES, LINES, TEXT, Mutation, mutated
from tests.fuzz.odd_files import ODD, put_odd_file

KIND = "data_files"

_SPLITS: dict[Split, str] = {"search": "search", "validation": "validation", "test": "test"}
_TEXTS = {"text": "text", "label": "label", "domain": "domain", "id": "id"}
_ARRAYS = {"pixel_values": "pixels", "label": "label", "domain": "domain", "id": None}
_ITEMS = 8


def _rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "text": f"item {index} of {split}, \u00e9\u4e2d",
            "label": ("good", "bad")[index % 2],
            "domain": ("left", "right")[index // 2 % 2],
            "id": f"{split}-{index}",
        }
        for index in range(_ITEMS)
    ]


def prepare(folder: Path) -> None:
    """Make the same items as tables of every kind, as folders of `datasets`, and as pictures."""
    disable_progress_bar()
    for kind in ("csv", "tsv", "jsonl", "json", "parquet", "arrow"):
        for split in _SPLITS.values():
            _write_table(folder / kind / f"{split}.{kind}", _rows(split))
    _datasets(folder / "texts", Features({**_PLAIN, "text": Value("string")}), _rows)
    pixels = ListOf(ListOf(Value("float32")))
    _datasets(folder / "arrays", Features({**_PLAIN, "pixels": pixels}), _pixel_rows)
    for split in _SPLITS.values():
        for index in range(4):
            place = folder / "pictures" / split / ("good", "bad")[index % 2] / f"{index}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            colour = (index * 40, len(split), 7)
            Image.new("RGB", (4, 4), colour).save(place)


_PLAIN = {
    "label": ClassLabel(names=["good", "bad"]),
    "domain": ClassLabel(names=["left", "right"]),
    "id": Value("string"),
}


def _pixel_rows(split: str) -> list[dict[str, Any]]:
    draw = np.random.default_rng(len(split))
    return [
        {key: value for key, value in row.items() if key != "text"}
        | {"pixels": draw.random((2, 2)).tolist()}
        for row in _rows(split)
    ]


def _datasets(folder: Path, features: Features, rows: Any) -> None:
    splits = {split: Dataset.from_list(rows(split), features) for split in _SPLITS.values()}
    DatasetDict(splits).save_to_disk(folder)


def _write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    if file.suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, [*rows[0]], delimiter="," if file.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue(), encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(list(rows)))
    elif file.suffix == ".parquet":
        parquet.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


#: Suffix -> mutations that suit such a file.
_TABLES: dict[str, tuple[dict[str, Mutation], ...]] = {
    ".csv": (LINES, LINES, TEXT, ANY),
    ".tsv": (LINES, LINES, TEXT, ANY),
    ".jsonl": (JSON_LINES, JSON_LINES, LINES, TEXT, ANY),
    ".json": (JSON, JSON, TEXT, ANY),
    ".parquet": (ANY,),
    ".arrow": (ANY,),
    ".png": (ANY,),
}


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a file of items or an answer, and read it in the way of those who need it.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    kinds = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "texts", "arrays", "arrays")
    kind = draw.choice((*kinds, "texts", "pictures", "answer", "answer"))
    if kind == "answer":
        _check_answer(draw)
        return
    folder = scratch / "items"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared / kind, folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    damaged = draw.choice(sorted(files))
    damaged.write_bytes(mutated(damaged.read_bytes(), draw, *_TABLES[damaged.suffix]))
    if not draw.randrange(ODD):
        put_odd_file(damaged, draw)
    if kind == "arrays" and draw.random() < 0.5:
        _check_calibration(folder, draw)
        return
    columns = {"arrays": _ARRAYS, "pictures": {"image": "image", "label": "label"}}
    _check_items(folder, columns.get(kind, _TEXTS), draw)


def _check_items(folder: Path, columns: dict[str, str | None], draw: Random) -> None:
    files = ItemFiles({"": folder}, classes={"": ["good", "bad"]} if draw.random() < 0.9 else None)
    tables = ItemTables(files, columns, "evaluators[0].data")
    if read_or_refuse(partial(tables.check, _SPLITS)) is None:
        return
    for split in _SPLITS.values():
        read_or_refuse(partial(tables.count, split))
        if "image" not in columns:  # pixels need a processor
            read_or_refuse(partial(tables.load, split))
        read_or_refuse(partial(tables.domains, split))
        read_or_refuse(partial(tables.identities, split))


def _check_calibration(folder: Path, draw: Random) -> None:
    options: dict[str, Any] = {
        **DEFAULTS,
        "data": str(folder),
        "split": draw.choice([*_SPLITS.values()]),
        "inputs": {"pixel_values": "pixels"},
        "label": "label",
        "domain": "domain",
        "model_class": "AutoModelForImageClassification",
    }
    layout = Layout.build({"w": ((2,), "float32")})
    refused = read_or_refuse(partial(refuse_calibration, layout, 2, {"calibration": options}))
    read_or_refuse(partial(domains_in, folder / options["split"], "domain"))
    read_or_refuse(partial(class_names, options))
    read_or_refuse(partial(check_experts, {"calibration": options}, ["left", "right"]))
    if refused is None:
        spec: Any = options
        read_or_refuse(partial(read_items, spec, str(folder), "left"))


def _check_answer(draw: Random) -> None:
    names = ("loss", "accuracy")
    whole = {
        "values": {"loss": 1.5, "accuracy": 0.25},
        "errors": {"loss": 0.1, "accuracy": 0.05},
        "items": {name: [0.5, 1.0, 0.25] for name in names},
    }
    reader = AnswerReader(names, draw.random() < 0.7, "evaluators[0]", "score.py")
    line = mutated(json.dumps(whole).encode(), draw, JSON, JSON, TEXT, ANY)
    output = "a line before\n" + line.decode("utf-8", "replace")
    answer = read_or_refuse(partial(reader.parse, output, "; last words: \x1b[2J"))
    if answer is not None:
        read_or_refuse(partial(reader.measurement, answer, 3))
