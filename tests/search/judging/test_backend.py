"""Trials that wait for a person beside workers that go on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators import Measurement
from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.search.judging.backend import Bell, JudgedBackend
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.opening import Judges
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.workers.backends import Backend
from mergesearch.search.workers.messages import Outcome, Task
from tests.evaluators.items import candidate_at


class Writers:
    """Workers that write a text of their task's name, without a model."""

    slots = 1

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self) -> list[Outcome]:
        task = self._tasks.popleft()
        outputs = (Output("prompt", "text", task.id.encode()),)
        exhibit = Exhibit("Which?", 1, outputs)
        exhibits = {} if task.id.startswith("unjudged") else {"preference": exhibit}
        measured = Measurement({"preference": 0.0, "other": 7.0}, exhibits=exhibits)
        return [Outcome(task.id, measured, None)]

    def close(self) -> None:
        self._tasks.clear()


class Setting:
    """A judged backend with all that it is made of."""

    def __init__(self, folder: Path, ahead: int = 1) -> None:
        self.bench = Bench(JudgingRecord(folder), 0)
        self.bell = Bell()
        self.stop = GracefulStop()
        self.said: list[int] = []
        self.when_waiting: Callable[[], None] = lambda: None

        def wrap(backend: Backend) -> JudgedBackend:
            retry = RetryPolicy(0)
            made = (self.bench, self.bell, self.stop, ahead, retry, self.say)
            self.backend = JudgedBackend(backend, *made)
            return self.backend

        self.judges = Judges(wrap)
        self.judges.wrapped(Writers())
        self.run("base", references=None)

    def say(self, count: int) -> None:
        """Called before the driver waits for choices alone."""
        self.said.append(count)
        self.when_waiting()

    def submit(self, name: str, **more: Any) -> None:
        point = [float(sum(name.encode()))]
        options = {"split": "search"} | more
        self.backend.submit(Task(name, candidate_at(point).recipe, **options))

    def run(self, name: str, **more: Any) -> list[str]:
        self.submit(name, **more)
        return [outcome.task for outcome in self.backend.wait()]

    def judge(self) -> None:
        """Prefer the text that comes later in the alphabet, wherever a pair is open."""
        while (view := self.bench.view()).state == "open":
            assert view.left is not None
            assert view.right is not None
            choice = "left" if view.left.text > view.right.text else "right"
            assert self.bench.choose(view.pair, choice)  # type: ignore[arg-type]
            self.bell.ring()

    def judge_on(self) -> None:
        """Judge in a thread whatever is open, until the bench is closed."""

        def judge() -> None:
            view = self.bench.view()
            while view.state != "over":
                self.judge()
                view = self.bench.view(self.bench.view().version, 600)

        threading.Thread(target=judge, daemon=True).start()

    def outcomes(self, count: int) -> list[Outcome]:
        """Wait for so many outcomes."""
        outcomes: list[Outcome] = []
        while len(outcomes) < count:
            outcomes += self.backend.wait()
        return outcomes


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    setting = Setting(tmp_path)
    yield setting
    setting.bench.close()


def test_outcomes_without_outputs_to_judge_pass_through(setting: Setting) -> None:
    assert setting.run("unjudged") == ["unjudged"]


def test_a_worker_is_free_while_its_trial_waits(setting: Setting) -> None:
    assert setting.backend.slots == 1
    assert setting.run("zebra") == []  # there is room for another
    assert setting.backend.slots == 2
    setting.submit("yak")
    setting.judge_on()
    done = setting.outcomes(2)
    by_name = {outcome.task: outcome.measurement for outcome in done}
    assert by_name.keys() == {"zebra", "yak"}
    for measured in by_name.values():
        assert measured is not None
        assert measured.values["preference"] > 0
        assert measured.values["other"] == 7
        assert 0 < measured.errors["preference"] < 2
        assert not measured.exhibits
    assert setting.backend.slots == 1


def test_no_more_trials_wait_than_the_study_allows(tmp_path: Path) -> None:
    setting = Setting(tmp_path, ahead=0)
    setting.submit("zebra")
    setting.judge_on()
    assert [outcome.task for outcome in setting.backend.wait()] == ["zebra"]
    setting.bench.close()


def test_held_out_outcomes_come_together_by_one_fit(setting: Setting) -> None:
    setting.run("base", references=None, split="validation")
    assert setting.run("zebra", split="validation") == []
    assert setting.run("yak", split="validation") == []
    assert setting.backend.slots == 3
    setting.judge()
    setting.submit("xenops", split="validation")
    setting.when_waiting = setting.judge_on
    outcomes = setting.backend.wait() or setting.backend.wait()  # after the first there is room
    values = {o.task: o.measurement.values["preference"] for o in outcomes if o.measurement}
    assert set(values) == {"zebra", "yak", "xenops"}
    strengths = {
        name: setting.bench.strength(
            "preference", "validation", candidate_at([float(sum(name.encode()))]).recipe.digest
        ).value
        for name in values
    }
    assert strengths == values


def test_a_stop_ends_the_wait_for_choices(setting: Setting) -> None:
    assert setting.run("zebra") == []

    def stop() -> None:
        setting.stop.requested = True
        setting.bell.ring()

    threading.Timer(0.05, stop).start()
    with pytest.raises(KeyboardInterrupt):
        setting.backend.wait()
    assert setting.said == [1]


def test_the_budget_does_not_count_the_wait_for_choices(setting: Setting) -> None:
    assert setting.run("zebra") == []
    threading.Timer(0.05, setting.judge).start()
    assert [outcome.task for outcome in setting.backend.wait()] == ["zebra"]
    idle = setting.backend.idle_seconds
    assert idle > 0
    before = time.monotonic() - idle
    assert before <= setting.judges.clock() <= time.monotonic() - idle


def test_equal_outputs_wait_for_nobody(setting: Setting) -> None:
    setting.submit("zebra")
    setting.judge_on()
    assert [outcome.task for outcome in setting.outcomes(1)] == ["zebra"]
    setting.bench.close()
    assert setting.run("zebra") == ["zebra"]
