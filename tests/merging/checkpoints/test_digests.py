"""Digests of stored tensors: right after every change, worked out once for a file that rests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergesearch.merging.checkpoints.digests
from mergesearch.merging.checkpoints.digests import tensor_digests
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo, read_header


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    return path


def rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some seconds pass."""
    now = path.stat().st_ctime + 60
    monkeypatch.setattr("mergesearch.merging.checkpoints.digests.time.time", lambda: now)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the tensors that are really hashed from now on."""
    names: list[str] = []
    original = mergesearch.merging.checkpoints.digests.hash_bytes

    def watched(info: TensorInfo) -> str:
        names.append(info.file.name)
        return original(info)

    monkeypatch.setattr("mergesearch.merging.checkpoints.digests.hash_bytes", watched)
    return names


def test_are_the_sha_256_of_the_bytes(file: Path) -> None:
    numbers = torch.arange(6.0).numpy().tobytes()
    assert tensor_digests(read_header(file))["a"] == hashlib.sha256(numbers).hexdigest()


def test_a_file_that_rests_is_hashed_once(
    file: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest(file, monkeypatch)
    first = tensor_digests(read_header(file))
    assert len(hashed) == 2
    assert tensor_digests(read_header(file)) == first
    assert len(hashed) == 2


def test_a_file_that_has_just_changed_is_not_trusted(file: Path, hashed: list[str]) -> None:
    for expected in (2, 4):
        tensor_digests(read_header(file))
        assert len(hashed) == expected


def test_a_change_is_seen_even_if_size_and_time_of_writing_are_restored(
    file: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest(file, monkeypatch)
    before = tensor_digests(read_header(file))
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x00")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = tensor_digests(read_header(file))
    assert len(hashed) == 4
    assert after != before


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": "short"}'])
def test_a_damaged_cache_is_ignored(
    file: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    rest(file, monkeypatch)
    expected = tensor_digests(read_header(file))
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text(content)
    assert tensor_digests(read_header(file)) == expected
    assert len(hashed) == 4


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "no-folder"))
    rest(file, monkeypatch)
    assert set(tensor_digests(read_header(file))) == {"a", "b"}
