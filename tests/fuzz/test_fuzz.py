"""A short cut of ``make fuzz``: a few seeds of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import check_seeds, fuzzers

SEEDS = range(24)


@pytest.mark.parametrize("kind", sorted(fuzzers()))
def test_damaged_files_are_refused_in_one_line_or_read(kind: str, tmp_path: Path) -> None:
    prepared = tmp_path / "real"
    prepared.mkdir()
    fuzzers()[kind].prepare(prepared)
    found = check_seeds(kind, prepared, SEEDS)
    assert not found, "\n".join(f"{each.command}: {each.what}" for each in found)


def test_a_broken_promise_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "run_folders"

    def check(prepared: Path, scratch: Path, seed: int) -> None:
        raise KeyError("damage")

    monkeypatch.setattr(fuzzers()[kind], "check", check)
    (found,) = check_seeds(kind, tmp_path, [7])
    assert "KeyError" in found.what
    assert found.command == "make fuzz KIND=run_folders SEED=7 COUNT=1"
