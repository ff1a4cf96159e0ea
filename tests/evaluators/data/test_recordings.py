"""Recordings of files are what a feature extractor makes of their samples, or are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import SPLITS
from mergesearch.evaluators.data import recordings
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.recordings import read_samples, resampled
from mergesearch.evaluators.data.splits import ItemTables
from mergesearch.merging import InputError
from tests.evaluators.data.test_files import SAME, write
from tests.evaluators.items import candidate_at, opened
from tests.evaluators.pairs import letter_tokenizer, pico_wav2vec
from tests.evaluators.recordings import (
    NAMES,
    RATE,
    WHISPER,
    class_folders,
    extractor_folder,
    noise,
    write_wave,
)

COLUMNS = {"input_values": "file", "label": "kind", "domain": None, "id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("recordings"))


def tables(path: Path, base: Path, columns: dict[str, Any] = COLUMNS) -> ItemTables:
    files = ItemFiles({"": path}, classes={"": NAMES}, checkpoint=str(base))
    return ItemTables(files, columns, "evaluators.0.data")


def refusal(path: Path, base: Path, columns: dict[str, Any] = COLUMNS) -> str:
    with pytest.raises(InputError) as caught:
        tables(path, base, columns).check(SAME)
    message = str(caught.value)
    assert message.startswith("evaluators.0.data")
    assert "\n" not in message
    return message


def loaded(items: ItemTables) -> dict[bytes, int]:
    """Bytes of the inputs of every item -> its class."""
    items.check(SAME)
    found: dict[bytes, int] = {}
    for split in SPLITS:
        columns = items.load(split)
        assert items.count(split) == len(columns["label"]) > 0
        pairs = zip(columns["input_values"], columns["label"].tolist(), strict=True)
        found |= {row.tobytes(): label for row, label in pairs}
    return found


def normalised(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What Wav2Vec2 reads: mean 0 and variance 1."""
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


class TestLayouts:
    def test_a_folder_of_classes(self, folder: Path) -> None:
        found = loaded(tables(folder / "sounds", folder / "base"))
        assert len(found) == 3 * 6
        for number, label in enumerate(NAMES):
            expected = normalised(noise(6 * number, 700))
            near = [
                kind
                for row, kind in found.items()
                if len(row) == 4 * 700
                and np.allclose(np.frombuffer(row, np.float32), expected, atol=1e-3)
            ]
            assert near == [NAMES.index(label)]

    def test_a_folder_of_classes_for_each_split(self, folder: Path, tmp_path: Path) -> None:
        for index, split in enumerate(SPLITS):
            for name in NAMES:
                (tmp_path / split / name).mkdir(parents=True)
                sound = (folder / "sounds" / name / f"{index}.wav").read_bytes()
                (tmp_path / split / name / "a.wav").write_bytes(sound)
        items = tables(tmp_path, folder / "base")
        items.check(SAME)
        assert [items.load(split)["label"].tolist() for split in SPLITS] == [[2, 1, 0]] * 3

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_a_table_of_paths(self, folder: Path, suffix: str) -> None:
        """Relative paths start at the table."""
        files = sorted((folder / "sounds").rglob("*.wav"))
        rows = [{"file": str(f.relative_to(folder)), "kind": f.parent.name} for f in files]
        path = write(folder / f"sounds.{suffix}", rows)
        assert loaded(tables(path, folder / "base")) == loaded(
            tables(folder / "sounds", folder / "base")
        )

    def test_bytes_and_what_datasets_stores(self, folder: Path, tmp_path: Path) -> None:
        import datasets

        files = sorted((folder / "sounds").rglob("*.wav"))
        rows = [{"file": f.read_bytes(), "kind": f.parent.name} for f in files]
        path = write(tmp_path / "sounds.parquet", rows)
        expected = loaded(tables(folder / "sounds", folder / "base"))
        assert loaded(tables(path, folder / "base")) == expected
        parts = {split: rows[index::3] for index, split in enumerate(SPLITS)}
        kinds = datasets.ClassLabel(names=list(NAMES))
        made = {
            split: datasets.Dataset.from_list(
                [
                    {"file": {"bytes": row["file"], "path": None}, "kind": row["kind"]}
                    for row in part
                ]
            )
            .cast_column("file", datasets.Audio(decode=False))
            .cast_column("kind", kinds)
            for split, part in parts.items()
        }
        datasets.DatasetDict(made).save_to_disk(str(tmp_path / "stored"))
        assert loaded(tables(tmp_path / "stored", folder / "base")) == expected


class TestSamples:
    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    def test_every_width_is_a_number_of_minus_one_to_one(self, tmp_path: Path, width: int) -> None:
        path = write_wave(tmp_path / "a.wav", noise(0), width=width)
        rate, samples = read_samples(path.read_bytes())
        assert (rate, samples.dtype) == (RATE, np.float32)
        np.testing.assert_allclose(samples, noise(0), atol=max(2.0 ** (1 - 8 * width), 1e-7))

    def test_floats_and_channels(self) -> None:
        from scipy.io import wavfile

        both = np.stack([noise(0), noise(1)], axis=1).astype(np.float32)
        stream = io.BytesIO()
        wavfile.write(stream, 22050, both)
        rate, samples = read_samples(stream.getvalue())
        assert rate == 22050
        np.testing.assert_allclose(samples, both.mean(axis=1), rtol=1e-6)

    @pytest.mark.parametrize("rate", [8000, 11025, 44100])
    def test_other_rates_become_the_extractors(self, rate: int) -> None:
        def tone(at: int) -> np.ndarray[Any, Any]:
            return np.sin(2 * np.pi * 440 * np.arange(at) / at).astype(np.float32)

        made = resampled(tone(rate), rate, RATE)
        assert len(made) == RATE
        assert made.dtype == np.float32
        # Filters ring at both ends.
        assert np.abs(made - tone(RATE))[800:-800].max() < 2e-3

    def test_files_of_another_rate(self, folder: Path, tmp_path: Path) -> None:
        for index in range(4):
            write_wave(tmp_path / f"{index}.wav", noise(index), rate=(8000, RATE)[index % 2])
        rows = [{"file": f"{index}.wav", "kind": "hum"} for index in range(4)]
        items = tables(write(tmp_path / "a.csv", rows), folder / "base")
        lengths = [len(row) // 4 for row in loaded(items)]
        assert sorted(lengths) == [800, 800, 1600, 1600]

    def test_flac(self, tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        whole = (noise(0) * 32767).astype(np.int16)
        for name in ("a.flac", "a.wav"):
            soundfile.write(tmp_path / name, whole, RATE, subtype="PCM_16")
            rate, samples = read_samples((tmp_path / name).read_bytes())
            assert rate == RATE
            np.testing.assert_array_equal(samples, soundfile.read(tmp_path / name)[0])
            np.testing.assert_array_equal(samples, (whole / 32768).astype(np.float32))


class TestRefused:
    def one(self, tmp_path: Path, content: bytes | None, name: str = "a.wav") -> Path:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return write(tmp_path / "a.csv", [{"file": name, "kind": "hum"}] * 3)

    def test_what_is_no_recording(self, folder: Path, tmp_path: Path) -> None:
        base = folder / "base"
        whole = write_wave(tmp_path / "whole.wav", noise(0)).read_bytes()
        empty = write_wave(tmp_path / "empty.wav", noise(0)[:0]).read_bytes()
        assert "found no " in refusal(self.one(tmp_path, None), base)
        for content in (b"RIFF", whole[:30], whole[:500], whole[:4] + b"\0" * 60, empty):
            message = refusal(self.one(tmp_path, content), base)
            assert "a.wav: expected a recording, received ValueError; mend" in message

    def test_other_formats_need_a_library(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recordings, "find_spec", lambda name: None)
        path = self.one(tmp_path, b"fLaC and more", "a.flac")
        message = refusal(path, folder / "base")
        assert "a.flac: expected a WAV file, or the library soundfile" in message
        assert "pip install 'mergesearch[audio]'" in message

    def test_extractors_that_do_not_fit(self, folder: Path, tmp_path: Path) -> None:
        sounds = folder / "sounds"
        assert "expected a preprocessor_config.json for recordings, found none in" in refusal(
            sounds, tmp_path
        )
        heard = extractor_folder(tmp_path / "whisper", WHISPER)
        assert "name the column as inputs: {input_features: COLUMN}" in refusal(sounds, heard)
        long = write_wave(tmp_path / "long.wav", noise(0, 3 * RATE // 2))
        columns = COLUMNS | {"input_features": "file"}
        del columns["input_values"]
        rows = [{"file": str(f), "kind": "hum"} for f in (long, *sorted(sounds.rglob("*.wav"))[:5])]
        message = refusal(write(tmp_path / "b.csv", rows), heard, columns)
        assert "recordings of at most 1 s" in message
        assert "received one of 1.5 s; cut it" in message

    def test_a_folder_of_recordings_holds_no_pictures_or_texts(self, folder: Path) -> None:
        for role in ("image", "text"):
            columns = {role: "wanted", "label": "kind", "domain": None, "id": None}
            message = refusal(folder / "sounds", folder / "base", columns)
            assert "expected a column 'wanted', received only ['audio', 'kind']" in message


class TestEvaluators:
    def test_classes_of_a_folder(self, folder: Path) -> None:
        """Loaded from files, they score as the arrays that they hold."""
        section = {
            "kind": "audio_classification",
            "data": {"file": str(folder / "sounds"), "classes": list(NAMES)},
            "batch_size": 1,
            "objectives": [{"metric": "cross_entropy"}],
        }
        section["data"]["processor"] = str(folder / "base")  # type: ignore[index]
        model = pico_wav2vec("classes")
        evaluator = opened(section)
        measured = evaluator.evaluate(candidate_at([0.0], model), "search")
        items = evaluator._items["search"]  # type: ignore[attr-defined]
        label = int(items.extra["label"][0])
        with torch.no_grad():
            logits = model(items.inputs["input_values"][0][None]).logits[0]
        assert abs(float(items.inputs["input_values"][0].mean())) < 1e-6
        expected = -float(logits.log_softmax(0)[label])
        assert measured.items["cross_entropy"][0] == pytest.approx(expected, rel=1e-5)

    def test_what_is_said_in_files(self, folder: Path, tmp_path: Path) -> None:
        letter_tokenizer(tmp_path / "letters")
        for index in range(8):
            write_wave(tmp_path / f"{index}.wav", noise(index, 1600))
        rows = [{"file": f"{index}.wav", "said": f"ab x{index}"} for index in range(8)]
        path = write(tmp_path / "said.csv", rows)
        evaluator = opened(
            {
                "kind": "speech_recognition",
                "data": {"file": str(path), "processor": str(folder / "base")},
                "inputs": {"input_values": "file"},
                "text": "said",
                "tokenizer": str(tmp_path / "letters"),
                "objectives": [{"metric": "cer"}, {"metric": "cross_entropy"}],
            }
        )
        measured = evaluator.evaluate(candidate_at([0.0], pico_wav2vec("ctc")), "search")
        assert measured.values["cer"] > 0
        assert measured.values["cross_entropy"] > 0

    def test_frames_of_different_lengths(self) -> None:
        from mergesearch.evaluators.model_items import read_items

        rows = np.empty(2, dtype=object)
        rows[:] = [np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)]
        batch = read_items({"input_features": rows}, "speech").arguments(pico_wav2vec("ctc"))
        assert batch["input_features"].shape == (2, 5, 4)
        assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
        with pytest.raises(InputError, match="expected arrays of one shape"):
            read_items({"input_values": rows}, "speech")
