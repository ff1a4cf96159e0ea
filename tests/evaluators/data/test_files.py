"""Items of tables and image folders: the same rows in every format, divided by content, refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import SPLITS
from mergesearch.evaluators.data.division import divide
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.splits import ItemTables
from mergesearch.evaluators.spec.data import DataSpec, resolve_data
from mergesearch.merging import InputError

COLUMNS = {"text": "review", "label": "stars", "domain": None, "id": None}
NAMES = ("bad", "good")
SAME = {split: split for split in SPLITS}


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Reviews of two classes, the last of which repeats the first but for case and spaces."""
    made = [{"review": f"text, {n}", "stars": NAMES[n % 2], "other": n} for n in range(count)]
    return [*made, made[0] | {"review": "TEXT,  0"}]


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    """A table in the format of the suffix."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(table[0]), delimiter="," if path.suffix == ".csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(table), path)
    return path


def tables(path: Path, columns: dict[str, Any] = COLUMNS, **options: Any) -> ItemTables:
    options = {"classes": {"": NAMES}} | options
    return ItemTables(ItemFiles({"": path}, **options), columns, "evaluators.0.data")


def refusal(path: Path, columns: dict[str, Any] = COLUMNS, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        tables(path, columns, **options).check(SAME)
    message = str(caught.value)
    assert message.startswith("evaluators.0.data")
    assert "\n" not in message
    return message


class TestFormats:
    @pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
    def test_every_format_gives_the_same_items(self, tmp_path: Path, suffix: str) -> None:
        items = tables(write(tmp_path / f"reviews.{suffix}", rows()))
        items.check(SAME)
        found = {}
        for split in SPLITS:
            loaded = items.load(split)
            found |= dict(zip(loaded["text"], loaded["label"].tolist(), strict=True))
            assert items.count(split) == len(loaded["text"]) > 0
        assert found == {row["review"]: NAMES.index(row["stars"]) for row in rows()}

    def test_a_folder_of_files_and_a_column_name_the_splits(self, tmp_path: Path) -> None:
        folder = tmp_path / "files"
        folder.mkdir()
        parts = dict(zip(SPLITS, (rows()[:20], rows()[20:30], rows()[30:40]), strict=True))
        for split, part in parts.items():
            write(folder / f"{split}.csv", part)
        whole = [row | {"part": split} for split, part in parts.items() for row in part]
        by_column = tables(write(tmp_path / "one.jsonl", whole), split="part")
        for items in (tables(folder), by_column):
            items.check(SAME)
            for split, part in parts.items():
                assert items.load(split)["text"] == [row["review"] for row in part]

    def test_a_file_for_each_domain(self, tmp_path: Path) -> None:
        paths = {
            name: write(
                tmp_path / f"{name}.csv",
                [row | {"review": f"{name} {row['review']}"} for row in rows()],
            )
            for name in ("books", "films")
        }
        files = ItemFiles(paths, classes={"books": NAMES, "films": NAMES[::-1]})
        items = ItemTables(files, COLUMNS | {"domain": "domain"}, "evaluators.0.data")
        assert items.check(SAME)["test"] == {"books", "films"}
        loaded = items.load("search")
        for text, label, domain in zip(
            loaded["text"], loaded["label"], loaded["domain"], strict=True
        ):
            number = int(text.split()[-1])
            assert text.startswith(domain)
            assert label == (number % 2 if domain == "books" else 1 - number % 2)

    def test_texts_that_look_like_numbers_stay_texts(self, tmp_path: Path) -> None:
        table = [{"review": f"00{n}", "stars": n % 2} for n in range(10)]
        items = tables(write(tmp_path / "n.csv", table))
        items.check(SAME)
        assert all(text.startswith("00") for split in SPLITS for text in items.load(split)["text"])

    def test_classes_of_the_checkpoint_number_the_names(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=4, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1},
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
        path = write(tmp_path / "reviews.csv", rows())
        items = tables(path, classes=None, checkpoint=str(tmp_path / "base"))
        items.check(SAME)
        loaded = items.load("search")
        assert {text: int(text.split()[-1]) % 2 for text in loaded["text"]} == dict(
            zip(loaded["text"], (1 - loaded["label"]).tolist(), strict=True)
        )
        # An expert's own head may have more classes than the base.
        numbers = write(tmp_path / "n.csv", [{"review": str(n), "stars": n} for n in range(9)])
        tables(numbers, classes=None, checkpoint=str(tmp_path / "base")).check(SAME)

    def test_bare_paths_become_sections_with_the_base(self, tmp_path: Path) -> None:
        write(tmp_path / "reviews.csv", rows())
        found = resolve_data("reviews.csv", tmp_path, "/base", str)
        assert found == DataSpec(file=str(tmp_path / "reviews.csv"), processor="/base")
        assert resolve_data("absent", tmp_path, "/base", str) == str(tmp_path / "absent")


class TestPictures:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from PIL import Image
        from transformers import AutoImageProcessor  # noqa: F401  # as late as in the product

        for name in NAMES:
            (tmp_path / "images" / name).mkdir(parents=True)
            for number in range(6):
                shade = 20 * number + 10 * (name == "good")
                picture = Image.new("RGB", (12, 12), (shade, shade, shade))
                picture.save(tmp_path / "images" / name / f"{number}.png")
        processor = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
            "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "size": {"height": 8, "width": 8}, "resample": 2, "rescale_factor": 1 / 255,
        }  # fmt: skip
        base = tmp_path / "base"
        base.mkdir()
        (base / "preprocessor_config.json").write_text(json.dumps(processor))
        (base / "config.json").write_text("{}")
        import torch
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(1)}, str(base / "model.safetensors"))
        return tmp_path

    def test_a_folder_of_classes(self, folder: Path) -> None:
        columns = {"input": "pixels", "label": "label", "domain": None, "id": None}
        items = tables(folder / "images", columns, checkpoint=str(folder / "base"))
        items.check(SAME)
        shades = set()
        for split in SPLITS:
            loaded = items.load(split)
            pixels = loaded["input"]
            assert pixels.shape == (len(loaded["label"]), 3, 8, 8)
            assert pixels.dtype == np.float32
            shade = np.rint((pixels[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(int)
            np.testing.assert_array_equal(shade % 20 == 10, loaded["label"] == 1)
            shades |= set(shade.tolist())
        assert len(shades) == 12

    @pytest.mark.parametrize("means", [1, 2])
    def test_a_processor_of_other_channels(self, folder: Path, means: int) -> None:
        path = folder / "base" / "preprocessor_config.json"
        changed = {"image_mean": [0.5] * means, "image_std": [0.5] * means}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        columns = {"input": "pixels", "label": "label", "domain": None, "id": None}
        items = tables(folder / "images", columns, checkpoint=str(folder / "base"))
        items.check(SAME)
        if means == 1:
            loaded = items.load("search")
            assert loaded["input"].shape == (len(loaded["label"]), 1, 8, 8)
            shade = np.rint((loaded["input"][:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(int)
            np.testing.assert_array_equal(shade % 20 == 10, loaded["label"] == 1)
        else:
            with pytest.raises(
                InputError, match=r"image processor of .*base takes, received Value"
            ):
                items.load("search")

    def test_columns_of_paths_and_bytes(self, folder: Path) -> None:
        columns = {"image": "file", "label": "kind", "domain": None, "id": None}
        files = sorted((folder / "images").rglob("*.png"))
        paths = [
            {"file": str(file.relative_to(folder)), "kind": file.parent.name} for file in files
        ]
        content = [{"file": file.read_bytes(), "kind": file.parent.name} for file in files]
        by_path = tables(write(folder / "a.csv", paths), columns, checkpoint=str(folder / "base"))
        by_bytes = tables(
            write(folder / "b.parquet", content), columns, checkpoint=str(folder / "base")
        )
        for items in (by_path, by_bytes):
            items.check(SAME)
        np.testing.assert_array_equal(by_path.load("test")["image"], by_bytes.load("test")["image"])

    def test_refused_pictures(self, folder: Path) -> None:
        columns = {"image": "file", "label": "kind", "domain": None, "id": None}
        assert "found none in None; name a checkpoint" in refusal(folder / "images", columns)
        (folder / "images" / "bad" / "0.png").write_bytes(b"no picture")
        assert "0.png: expected a picture, received" in refusal(folder / "images", columns)
        absent = write(folder / "a.csv", [{"file": "absent.png", "kind": "bad"}])
        assert "expected a picture, found no" in refusal(absent, columns)


class TestDivision:
    def test_duplicates_stay_together_whatever_the_order(self, tmp_path: Path) -> None:
        sides = []
        for table in (rows(), rows()[::-1]):
            items = tables(write(tmp_path / "reviews.csv", table))
            items.check(SAME)
            sides.append({t: split for split in SPLITS for t in items.load(split)["text"]})
        assert sides[0] == sides[1]
        assert sides[0]["text, 0"] == sides[0]["TEXT,  0"]

    def test_shares_hold_in_every_class(self) -> None:
        strata = [n % 5 == 0 for n in range(100)]
        parts = divide([str(n) for n in range(100)], strata, (0.6, 0.2, 0.2), 0)
        for stratum, expected in ((True, [12, 4, 4]), (False, [48, 16, 16])):
            counted = Counter(
                part for part, own in zip(parts.tolist(), strata, strict=True) if own == stratum
            )
            assert [counted[index] for index in range(3)] == expected

    def test_another_seed_divides_otherwise(self) -> None:
        names = [str(n) for n in range(50)]
        one, two = (divide(names, [0] * 50, (1, 1, 1), seed) for seed in (0, 1))
        assert (one != two).any()
        np.testing.assert_array_equal(one, divide(names, [0] * 50, (1, 1, 1), 0))

    def test_small_classes_are_in_every_part(self) -> None:
        parts = divide(list("abcd"), [0, 0, 0, 1], (0.98, 0.01, 0.01), 0)
        assert sorted(parts[:3].tolist()) == [0, 1, 2]
        assert parts[3] == 0
        # Classes of one item each are divided as one.
        alone = divide(list("abcdef"), list(range(6)), (0.6, 0.2, 0.2), 0)
        assert Counter(alone.tolist()) == {0: 4, 1: 1, 2: 1}


class TestRefused:
    def test_missing_column(self, tmp_path: Path) -> None:
        path = write(tmp_path / "reviews.csv", rows())
        message = refusal(path, COLUMNS | {"text": "body"})
        assert "expected a column 'body', received only ['other', 'review', 'stars']" in message

    @pytest.mark.parametrize("content", ["", "review,stars\n"])
    def test_empty_file(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "reviews.csv"
        path.write_text(content)
        assert "expected items, received an empty file" in refusal(path)

    def test_unknown_label(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "reviews.csv", [*rows(), {"review": "x", "stars": "fair", "other": 0}]
        )
        message = refusal(path)
        assert "column 'stars': expected classes among ['bad', 'good'], received 'fair'" in message
        numbers = write(tmp_path / "n.csv", [{"review": str(n), "stars": n} for n in range(9)])
        assert "expected class numbers below 2" in refusal(numbers)

    def test_names_without_numbers(self, tmp_path: Path) -> None:
        message = refusal(write(tmp_path / "reviews.csv", rows()), classes=None)
        assert "received string; list names such as 'bad' in the order of the model's" in message

    @pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
    def test_other_encodings(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path / f"reviews.{suffix}", rows())
        path.write_bytes(path.read_bytes().replace(b"text, 7", b"caf\xe9"))
        assert "expected UTF-8, received byte 0xe9 at position" in refusal(path)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            (
                "a.jsonl",
                '{"review": 1\n',
                "expected a readable .jsonl file, received JSONDecodeError",
            ),
            ("a.jsonl", "[1]\n", "expected an object for every item"),
            ("a.json", "{}", "expected a list of objects, found dict"),
            ("a.parquet", "no", "expected a readable .parquet file, received ArrowInvalid"),
            ("a.txt", "no", "expected a file of .csv, .tsv"),
            ("a.csv", 'review,stars\n"a,b,c\nd', "expected a readable .csv file"),
        ],
    )
    def test_other_content(self, tmp_path: Path, name: str, content: str, expected: str) -> None:
        (tmp_path / name).write_text(content)
        assert expected in refusal(tmp_path / name)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "expected a folder of .csv" in refusal(tmp_path)

    def test_missing_split_and_shared_items(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            write(tmp_path / f"{split}.csv", rows()[:4])
        message = refusal(tmp_path)
        assert "expected a split 'search', found only ['test', 'train']; name them" in message
        with pytest.raises(InputError, match="received 4 items in both 'train' and 'test'"):
            tables(tmp_path).check({"search": "train", "test": "test"})

    def test_too_few_items(self, tmp_path: Path) -> None:
        path = write(tmp_path / "reviews.csv", rows()[:2])
        assert "expected items for three splits, received 2 different ones" in refusal(path)
        assert "expected no column of splits" in refusal(tmp_path, split="part")

    def test_sections(self) -> None:
        with pytest.raises(ValueError, match="three positive shares"):
            DataSpec(file="a", divide=(1, 0, 0))
        with pytest.raises(ValueError, match="one for each of the domains"):
            DataSpec(file={"a": "a.csv"}, classes={"b": ["x"]})
