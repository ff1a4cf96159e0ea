"""An arena file is compared with its hash once, and trusted while it stays the same."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from mergesearch.merging.resident import arena_stamp
from mergesearch.merging.resident.arena_files import hash_file
from mergesearch.merging.resident.arena_stamp import (
    is_whole,
    remember,
    remove_stamps,
    stamp_file,
)


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    file = tmp_path / "key.0123.arena"
    file.write_bytes(os.urandom(10_000))
    return file


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read to be hashed."""
    files: list[Path] = []

    def counting(path: Path) -> str:
        files.append(path)
        return hash_file(path)

    monkeypatch.setattr(arena_stamp, "hash_file", counting)
    return files


def test_a_file_is_read_once_and_then_trusted(arena: Path, hashed: list[Path]) -> None:
    content = hash_file(arena)
    assert all(is_whole(arena, content) for _ in range(3))
    assert hashed == [arena]


def test_what_was_just_written_is_not_read_again(arena: Path, hashed: list[Path]) -> None:
    content = hash_file(arena)
    remember(arena, content)
    assert is_whole(arena, content)
    assert hashed == []


@pytest.mark.parametrize("damage", ["in place", "longer", "another file", "old time"])
def test_a_file_that_changed_is_read_again(arena: Path, hashed: list[Path], damage: str) -> None:
    content = hash_file(arena)
    assert is_whole(arena, content)
    changed = bytearray(arena.read_bytes())
    changed[5000] ^= 1
    times = arena.stat()
    if damage == "another file":
        arena.unlink()
    if damage == "longer":
        changed += b"0"
    with arena.open("r+b" if arena.exists() else "wb") as file:
        file.write(changed)
    if damage == "old time":
        os.utime(arena, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert not is_whole(arena, content)
    assert not is_whole(arena, content), "a damaged file leaves no stamp"
    assert len(hashed) == 3


def test_a_stamp_of_other_content_or_another_boot_counts_for_nothing(
    arena: Path, hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = hash_file(arena)
    assert is_whole(arena, content)
    assert not is_whole(arena, "0" * 32)
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr(arena_stamp, "BOOT_ID", boot)
    assert is_whole(arena, content)
    assert len(hashed) == 3


def test_a_torn_stamp_counts_for_nothing(arena: Path, hashed: list[Path]) -> None:
    content = hash_file(arena)
    stamp_file(arena).write_text('{"content": "')
    assert is_whole(arena, content)
    assert hashed == [arena]


def test_processes_that_ask_at_once_wait_for_the_one_that_reads(
    arena: Path, hashed: list[Path]
) -> None:
    content = hash_file(arena)
    answers: list[bool] = []
    with stamp_file(arena).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a process that reads the file does
        asking = [
            threading.Thread(target=lambda: answers.append(is_whole(arena, content)))
            for _ in range(4)
        ]
        for thread in asking:
            thread.start()
        assert not answers
    for thread in asking:
        thread.join()
    assert answers == [True] * 4
    assert hashed == [arena]


def test_where_no_stamp_can_be_left_the_file_is_read_each_time(
    arena: Path, hashed: list[Path]
) -> None:
    content = hash_file(arena)
    stamp_file(arena).mkdir()  # nobody can open it, not even root
    assert is_whole(arena, content)
    assert is_whole(arena, content)
    assert hashed == [arena, arena]


def test_stamps_go_with_their_file(arena: Path) -> None:
    other = arena.with_name("key.4567.arena")
    other.write_bytes(b"1")
    for file in (arena, other):
        remember(file, "")
    remove_stamps(arena)
    assert not stamp_file(arena).exists()
    assert stamp_file(other).exists()
