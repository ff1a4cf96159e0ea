"""The durable record: round trips, torn lines, metric names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mergesearch.evaluators import Measurement, Objective
from mergesearch.merging import Field, InputError, Recipe, RunFolderError, Source
from mergesearch.search.record.array_text import (
    decode_array,
    encode_array,
    pack_items,
    unpack_items,
)
from mergesearch.search.record.storage import open_storage, read_storage, repair_journal
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import Score
from mergesearch.search.workers.messages import Failure, Outcome

DIM = 3
TEMPLATE = Recipe(
    Source("", ""), (), "task_arithmetic", Field(np.arange(DIM + 1), np.zeros((1, DIM)))
)
OBJECTIVES = (Objective("accuracy", "maximize"), Objective("loss", "minimize"))


def decode(point: np.ndarray) -> Recipe:
    return TEMPLATE.with_field(Field(np.arange(DIM + 1), point[None]))


def open_log(path: Path) -> TrialLog:
    return TrialLog(open_storage(path), "study", OBJECTIVES, decode, TEMPLATE)


def ask(log: TrialLog, point: np.ndarray, index: int) -> int:
    record = log.ask(
        "search",
        decode(point),
        point=point,
        suggestion=index,
        tells_at_ask=index,
        summary={"x": 0.5},
        bounds=(0, 1),
    )
    return record.number


def outcome(items: np.ndarray) -> Outcome:
    measurement = Measurement(
        {"accuracy": 0.75, "loss": 1.5}, {"accuracy": 0.1}, {"accuracy": items}
    )
    return Outcome("0", measurement, None, {"merge": 0.5, "evaluate": 1.0}, "host:1")


def test_records_survive_reopening(tmp_path: Path) -> None:
    log = open_log(tmp_path / "journal.log")
    point = np.array([0.1, 1 / 3, np.pi])
    items = np.array([1.0, 0.0, 1.0, 1.0])
    log.tell(ask(log, point, 0), outcome(items), 0)
    log.tell(
        ask(log, point / 2, 1),
        Outcome("1", None, Failure("error", "boom", "Traceback"), {"merge": 0.1}),
        1,
    )
    anchor = log.ask("anchor", decode(np.ones(3)), name="average", summary={}, bounds=(0, 1))
    again = open_log(tmp_path / "journal.log")
    first, second, third = again.records
    assert first.point.tobytes() == point.tobytes()
    assert first.recipe.digest == decode(point).digest
    assert (first.values, first.errors) == ({"accuracy": 0.75, "loss": 1.5}, {"accuracy": 0.1})
    np.testing.assert_array_equal(first.items["accuracy"], items)
    assert (first.worker, first.seconds["evaluate"], first.tell_index) == ("host:1", 1.0, 0)
    assert second.state == "failed"
    assert second.failure == Failure("error", "boom", "Traceback")
    assert (third.state, third.name, third.recipe.digest) == (
        "running",
        "average",
        anchor.recipe.digest,
    )


def test_optuna_sees_names_directions_and_states(tmp_path: Path) -> None:
    import optuna

    log = open_log(tmp_path / "journal.log")
    log.tell(ask(log, np.zeros(3), 0), outcome(np.ones(2)), 0)
    study = optuna.load_study(study_name="study", storage=read_storage(tmp_path / "journal.log"))
    assert study.metric_names == ["accuracy", "loss"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[0].values == [0.75, 1.5]
    assert study.trials[0].params == {"x": 0.5}


@pytest.mark.parametrize("torn", [b"{", b'{"op_code": 4, "worker_id": "a', b"\x00garbage"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.log"
    log = open_log(path)
    log.tell(ask(log, np.zeros(3), 0), outcome(np.ones(2)), 0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = open_log(path)
    ask(again, np.ones(3), 1)
    assert len(open_log(path).records) == 2


def test_repair_reports_what_it_cut_and_leaves_whole_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    assert repair_journal(path) == 0
    path.write_bytes(b"x" * 200_000)
    assert repair_journal(path) == 200_000
    path.write_bytes(b"one\ntwo\n")
    assert repair_journal(path) == 0
    path.write_bytes(b"one\n" + b"y" * 100_000)
    assert repair_journal(path) == 100_000
    assert path.read_bytes() == b"one\n"


def test_a_dead_writers_lock_is_removed(tmp_path: Path) -> None:
    log = open_log(tmp_path / "journal.log")
    (tmp_path / "journal.log.lock").write_text("")
    again = open_log(tmp_path / "journal.log")
    ask(again, np.zeros(3), 0)
    assert len(log.records) == 0
    assert len(open_log(tmp_path / "journal.log").records) == 1


def test_scores_of_re_evaluations(tmp_path: Path) -> None:
    log = open_log(tmp_path / "journal.log")
    score = Score(
        {"accuracy": 0.5, "loss": 2.0},
        {"accuracy": 0.1},
        {"accuracy": np.array([0.0, 1.0])},
        weights={"accuracy": np.array([0.25, 0.75]), "loss": np.array([0.5, 0.5])},
    )
    log.results.set_score("validation", 3, score)
    log.results.set_score("validation", 4, None)
    again = open_log(tmp_path / "journal.log")
    assert again.results.score("validation", 3) == (True, score)
    np.testing.assert_array_equal(
        again.results.score("validation", 3)[1].items["accuracy"], [0.0, 1.0]
    )
    weights = again.results.score("validation", 3)[1].weights  # equal ones say nothing
    assert {name: each.tolist() for name, each in weights.items()} == {"accuracy": [0.25, 0.75]}
    assert again.results.score("validation", 4) == (True, None)
    assert again.results.score("test", 3) == (False, None)


def test_packing_is_exact_for_binary_scores_and_close_for_others() -> None:
    rng = np.random.default_rng(0)
    binary = (rng.random(1003) < 0.4).astype(float)
    np.testing.assert_array_equal(unpack_items(pack_items(binary)), binary)
    real = rng.standard_normal(17)
    np.testing.assert_allclose(unpack_items(pack_items(real)), real, rtol=1e-6)
    point = rng.standard_normal(100)
    assert decode_array(encode_array(point)).tobytes() == point.tobytes()


def test_reading_a_missing_journal_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found none"):
        read_storage(tmp_path / "journal.log")
    assert list(tmp_path.iterdir()) == []


def test_a_password_never_shows_in_errors() -> None:
    with pytest.raises(InputError) as error:
        open_storage("postgresql://user:s3cret@127.0.0.1:1/none")
    assert "s3cret" not in str(error.value)
    assert "user:***@127.0.0.1" in str(error.value)


def test_a_part_of_the_items_is_partial_and_stays_out_of_rankings(tmp_path: Path) -> None:
    log = open_log(tmp_path / "journal.log")
    point = np.full(DIM, 0.25)
    record = log.ask(
        "search", decode(point), point=point, suggestion=0, item_count=2, summary={}, bounds=(0, 1)
    )
    finished = log.tell(record.number, outcome(np.array([1.0, 0.0])), 0)
    assert (finished.state, finished.item_count) == ("partial", 2)
    (again,) = open_log(tmp_path / "journal.log").records
    assert (again.state, again.item_count) == ("partial", 2)
    assert dict(again.values) == {"accuracy": 0.75, "loss": 1.5}
    storage = read_storage(tmp_path / "journal.log")
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("study"))
    assert trial.state.name == "PRUNED"


def test_a_live_strategy_sees_item_scores_as_its_replay_will(tmp_path: Path) -> None:
    """The log keeps scores in single precision; what a live strategy is told must not be finer."""
    log = open_log(tmp_path / "journal.log")
    scores = np.array([1 / 3, 0.1, 0.7])
    finished = log.tell(ask(log, np.zeros(DIM), 0), outcome(scores), 0)
    (again,) = open_log(tmp_path / "journal.log").records
    np.testing.assert_array_equal(finished.items["accuracy"], again.items["accuracy"])
    assert not np.array_equal(finished.items["accuracy"], scores)


def test_fields_are_recorded_where_points_cannot_be_read_without_weights(tmp_path: Path) -> None:
    def unreadable(point: np.ndarray) -> Recipe:
        raise AssertionError("needs weights")

    storage = open_storage(tmp_path / "journal.log")
    log = TrialLog(storage, "study", OBJECTIVES, unreadable, TEMPLATE, keep_fields=True)
    point = np.array([0.1, 0.2, 0.3])
    record = log.ask("search", decode(point), point=point, suggestion=0, summary={}, bounds=(0, 1))
    again = TrialLog(storage, "study", OBJECTIVES, unreadable, TEMPLATE, keep_fields=True)
    assert again.records[0].recipe.digest == record.recipe.digest
    assert again.records[0].point.tobytes() == point.tobytes()


def test_a_result_of_several_operations_is_synced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "journal.log")
    number = ask(log, np.zeros(DIM), 0)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    log.tell(number, outcome(np.ones(2)), 0)
    assert len(synced) == 1
    with log.batched_writes():
        log.tell(ask(log, np.ones(DIM), 1), outcome(np.ones(2)), 1)
        ask(log, np.full(DIM, 0.5), 2)
    assert len(synced) == 2
