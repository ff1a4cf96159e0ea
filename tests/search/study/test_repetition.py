"""The winner is repeated beside its test items, where a worker would idle."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from experiments.bench.driver import study_of
from mergesearch.search.runs import driver
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.workers.backends.inline import Inline
from mergesearch.search.workers.messages import Outcome


class Slots(Inline):
    """Three tasks at a time, of which the latest ends first."""

    slots = 3
    together: ClassVar[list[set[str]]] = []

    def wait(self) -> list[Outcome]:
        """Note what runs at the same time."""
        self.together.append({f"{task.split} {task.id}" for task in self._tasks})
        self._tasks.rotate(1)
        return super().wait()


def test_the_winner_is_repeated_while_its_test_items_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(2, 6, "sobol") | {"selection": {"leaders": 2, "repeats": 2}}
    monkeypatch.setattr(driver, "open_backend", lambda section, spec, *_: Slots(spec))
    monkeypatch.setattr(Slots, "together", [])
    run_study(resolve(validate(study, "repetition"), tmp_path), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.verdict is not None
    winner = run.verdict.winner
    expected = {f"test {winner}", "search repeat 0", "search repeat 1"}
    assert expected in Slots.together
    own = run.log.records[winner].values
    assert run.log.get_attr("repeats") == [dict(own)] * 2
    assert [*run.verdict.scores["test"]] == [winner]
