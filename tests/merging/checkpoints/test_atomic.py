"""Files that appear whole or not at all, and what is no file is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergesearch.merging.checkpoints.atomic import write_atomically


def test_a_link_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "stdout"
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            write_atomically(path, "text")
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [pipe, link]
