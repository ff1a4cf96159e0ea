"""Repairs of runs whose trials end out of order, early, or with gradients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.search.record.attributes import ASKED, GRADIENT_RESULT
from mergesearch.search.runs import driver
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.reading import read_run
from mergesearch.search.runs.repair.repairing import repair
from mergesearch.search.workers.backends.inline import Inline
from mergesearch.search.workers.messages import Outcome
from tests.search.conftest import model_study
from tests.search.runs.test_repairing import asks, end_of, garbled
from tests.search.studies import analytic, run_in

Data = dict[str, Any]
#: Runs of every case that lose a few lines each.
LOSSES = range(4)


class OutOfOrder(Inline):
    """Several tasks at once, of which a drawn one is finished next, as workers of a pool do."""

    slots = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._draw = np.random.default_rng(0)

    def wait(self) -> list[Outcome]:
        """Run any task."""
        self._tasks.rotate(int(self._draw.integers(len(self._tasks))))
        return super().wait()


def stopped(rule: str, **options: Any) -> Data:
    """A study whose trials end early, on losses of 200 items."""
    problem = {"kind": "synthetic", "problem": "ellipsoid", "items": 200, "noise": 0.02}
    fidelity = {"rule": rule, "min_items": 20, **options}
    return analytic(trials=30, dim=3, evaluators=[problem], fidelity=fidelity)


def with_gradients(name: str, **options: Any) -> Callable[[Path, Path], Data]:
    """A study of small models by a strategy that follows gradients."""

    def make(models: Path, items: Path) -> Data:
        study = model_study(models, items, name=name, space={}, budget={"trials": 12})
        labels = study["evaluators"][0]
        entropy = {"kind": "entropy", **{key: labels[key] for key in ("data", "domain", "id")}}
        labels |= {"objectives": [{"name": "accuracy", "metric": "accuracy"}]}
        study["evaluators"] = [entropy, labels]
        return study | {"strategy": {"name": name, **options}}

    return make


#: Case -> the study, and whether its trials end out of order.
CASES: dict[str, tuple[Callable[[Path, Path], Data], bool]] = {
    "out of order": (lambda models, items: analytic(trials=24, dim=2, strategy="cma_es"), True),
    "race": (lambda models, items: stopped("race"), False),
    "race out of order": (lambda models, items: stopped("race"), True),
    "halving": (lambda models, items: stopped("halving"), False),
    "hyperband out of order": (lambda models, items: stopped("hyperband"), True),
    "adamerging": (with_gradients("adamerging", steps=3), False),
    "gradient_warm_cma": (with_gradients("gradient_warm_cma", warm=3), True),
}


@pytest.fixture(scope="module", params=CASES)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    pico_models: Path,
    pico_items: Path,
) -> Iterator[tuple[Data, Run]]:
    """A study, and its run that nothing happened to."""
    make, shuffled = CASES[request.param]
    data = make(pico_models, pico_items)
    with pytest.MonkeyPatch.context() as patch:
        if shuffled:
            patch.setattr(driver, "open_backend", lambda section, spec, *_: OutOfOrder(spec))
        yield data, run_in(data, tmp_path_factory.mktemp("kinds") / "run")


def test_trials_that_take_steps_alone_are_read_back_and_repaired(tmp_path: Path) -> None:
    problem = {"kind": "synthetic", "problem": "ellipsoid", "items": 40, "noise": 0.02}
    strategy = {"name": "adamerging", "coordinates": "logit", "shares": 3}
    data = analytic(trials=16, dim=4, strategy=strategy, evaluators=[problem])
    run = run_in(data, tmp_path / "whole")
    assert any(record.item_count == 0 for record in run.log.records)
    assert end_of(run_in(data, tmp_path / "whole")) == end_of(run)
    assert len(read_run(tmp_path / "whole").records) == len(run.log.records)
    folder = copied(run, tmp_path / "run", losing(run, 1))
    repair(folder, write=True)
    assert end_of(run_in(data, folder)) == end_of(run)


def copied(run: Run, folder: Path, change: Callable[[list[bytes]], None]) -> Path:
    """A copy of a run with other lines in its journal, and without its report."""
    shutil.copytree(run.folder.path, folder, ignore=shutil.ignore_patterns("report*", "*.png"))
    journal = folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    change(lines)
    journal.write_bytes(b"".join(lines))
    return folder


def lines_of_the_search(lines: list[bytes], run: Run) -> list[int]:
    """Places of lines that ask or tell trials of the search; anchors get other numbers."""
    logs = [json.loads(line) for line in lines]
    searched = {record.number for record in run.log.records if record.kind == "search"}
    created = -1
    places = []
    for at, log in enumerate(logs):
        created += log["op_code"] == 4
        number = created if log["op_code"] == 4 else log.get("trial_id")
        places += [at] if number in searched else []
    return places


def losing(run: Run, seed: int) -> Callable[[list[bytes]], None]:
    """Overwrites the middle of a few lines."""

    def change(lines: list[bytes]) -> None:
        draw = np.random.default_rng(seed)
        places = lines_of_the_search(lines, run)
        for at in draw.choice(places, 1 + seed, replace=False):
            lines[at] = lines[at][:30] + bytes(40) + lines[at][60:]

    return change


def test_a_lost_question_is_asked_again_where_its_line_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "open_backend", lambda section, spec, *_: OutOfOrder(spec))
    data = analytic(trials=12, dim=2, strategy="cma_es")
    run = run_in(data, tmp_path / "whole")
    wanted = [asks(number) for number in (4, 5, 8)]
    folder = copied(run, tmp_path / "run", garbled(*wanted))
    assert repair(folder, write=True).salvage.asked == (4, 5, 8)
    assert end_of(run_in(data, folder)) == end_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LOSSES)
def test_lost_lines_are_made_again_whatever_ended_the_trials(
    seed: int, finished: tuple[Data, Run], tmp_path: Path
) -> None:
    data, run = finished
    folder = copied(run, tmp_path / "run", losing(run, seed))
    made = repair(folder, write=True)
    assert made.salvage.again or made.salvage.asked
    assert end_of(run_in(data, folder)) == end_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LOSSES)
def test_journals_whose_trials_have_no_numbers_are_repaired_too(
    seed: int, finished: tuple[Data, Run], tmp_path: Path
) -> None:
    data, run = finished

    def change(lines: list[bytes]) -> None:
        lines[:] = [without_number(line) for line in lines]
        losing(run, seed)(lines)

    folder = copied(run, tmp_path / "run", change)
    repair(folder, write=True)
    assert end_of(run_in(data, folder)) == end_of(run)


def without_number(line: bytes) -> bytes:
    """A line as versions wrote it that did not record the number of a trial."""
    log = json.loads(line)
    if log["op_code"] != 4:
        return line
    asked = json.loads(log["system_attrs"][ASKED])
    del asked["number"]
    log["system_attrs"][ASKED] = json.dumps(asked)
    return json.dumps(log).encode() + b"\n"


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["adamerging", "gradient_warm_cma"], indirect=True)
def test_a_result_without_its_gradients_is_measured_again(
    finished: tuple[Data, Run], tmp_path: Path
) -> None:
    data, run = finished

    def drop(lines: list[bytes]) -> None:
        with_one = [at for at, line in enumerate(lines) if GRADIENT_RESULT.encode() in line]
        del lines[with_one[len(with_one) // 2]]

    folder = copied(run, tmp_path / "run", drop)
    repair(folder, write=True)
    assert end_of(run_in(data, folder)) == end_of(run)
