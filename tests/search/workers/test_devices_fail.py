"""Cards that fail, and fractions of cards, on a real cluster whose GPUs exist in name only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.study.events import Event
from mergesearch.search.workers.backends.ray_pool import RayPool
from mergesearch.search.workers.messages import WorkerSpec
from tests.cluster import Cluster
from tests.contracts.test_backends import TEMPLATE, drain, task
from tests.search.studies import analytic, spec_of

pytestmark = pytest.mark.xdist_group("ray")

#: Answers every trial; on the cards that the file ``broken`` names it fails as CUDA does. Where
#: there is a file ``patient``, working cards answer once the broken ones have failed twice.
PROGRAM = """#!/bin/sh
cat > /dev/null
echo "$CUDA_VISIBLE_DEVICES" >> {folder}/used
if grep -qx "$CUDA_VISIBLE_DEVICES" {folder}/broken; then
  echo "RuntimeError: CUDA error: an illegal memory access was encountered" >&2
  exit 1
fi
while [ -e {folder}/patient ] && [ "$(grep -cxf {folder}/broken {folder}/used)" -lt 2 ]; do
  sleep 0.1
done
echo '{{"values": {{"f": 1.0}}}}'
"""


@pytest.fixture
def program(tmp_path: Path) -> dict[str, Any]:
    """An evaluator that breaks on the cards in ``broken``, and notes in ``used`` where it ran."""
    (tmp_path / "broken").write_text("")
    script = tmp_path / "program"
    script.write_text(PROGRAM.format(folder=tmp_path))
    script.chmod(0o755)
    objectives = [{"name": "f", "direction": "minimize"}]
    return {"kind": "command", "command": [str(script)], "objectives": objectives, "model": "none"}


def used(folder: Path) -> Counter[str]:
    """Evaluations by the cards that they could see."""
    return Counter((folder / "used").read_text().split())


@pytest.fixture
def pool(
    cluster: Cluster, tmp_path: Path, program: dict[str, Any]
) -> Iterator[Callable[..., RayPool]]:
    opened: list[RayPool] = []

    def start(**section: Any) -> RayPool:
        spec = WorkerSpec(TEMPLATE, (program,), str(tmp_path))
        workers = WorkersSection(backend="ray", address=cluster.address, **section)
        opened.append(RayPool(workers, spec))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def gpu_study(cluster: Cluster, program: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A study on every card of the cluster: the successor of a worker has to return to its card."""
    workers = {"address": cluster.address, "count": 4, "gpus": 1, "cpus": 0.5}
    return analytic(
        "poisoned",
        trials=60,
        strategy="sobol",
        evaluators=[program],
        anchors="none",
        allow_code=True,
        workers=workers,
        **sections,
    )


@pytest.mark.slow
def test_a_broken_card_costs_no_trial_and_is_set_aside_and_named(
    cluster: Cluster, tmp_path: Path, program: dict[str, Any]
) -> None:
    (tmp_path / "broken").write_text("0\n")
    (tmp_path / "patient").touch()
    events: list[Event] = []
    data = gpu_study(cluster, program, max_consecutive_failures=1)
    run = run_study(spec_of(data, tmp_path), tmp_path / "run", events.append)
    records = run.log.records
    assert [record.state for record in records] == ["complete"] * 60
    assert all(record.failure is None for record in records)
    assert used(tmp_path)["0"] == 2, "two errors, then no more"
    warnings = [event.text for event in events if event.kind == "warning"]
    assert any("set aside" in text and "GPU 0 of" in text for text in warnings), warnings
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Set aside after device errors; its trials ran elsewhere: GPU 0 of" in report


@pytest.mark.slow
def test_a_study_without_a_card_left_stops_and_goes_on_later(
    cluster: Cluster, tmp_path: Path, program: dict[str, Any]
) -> None:
    (tmp_path / "broken").write_text("0\n1\n2\n3\n")
    data = gpu_study(cluster, program) | {"budget": {"trials": 6}}
    with pytest.raises(StudyFailedError, match=r"every one set aside .* GPU . of"):
        run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert set(used(tmp_path)) == {"0", "1", "2", "3"}, "every card was tried"
    assert {record.state for record in open_run(tmp_path / "run").log.records} == {"running"}
    (tmp_path / "broken").write_text("")
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert [record.state for record in run.log.records] == ["complete"] * 6


@pytest.mark.slow
def test_workers_of_a_fraction_fill_the_cards_evenly(
    pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    workers = pool(count=4, gpus=0.25, cpus=0.5)
    assert len(workers.pids()) == 4
    for number in range(8):
        workers.submit(task(number))
    assert len(drain(workers, 8)) == 8
    assert used(tmp_path) == {"0": 2, "1": 2, "2": 2, "3": 2}


@pytest.mark.slow
def test_two_workers_share_each_card(pool: Callable[..., RayPool], tmp_path: Path) -> None:
    workers = pool(per_gpu=2, cpus=0.25)
    assert len(workers.pids()) == 8
    for number in range(16):
        workers.submit(task(number))
    assert len(drain(workers, 16)) == 16
    assert used(tmp_path) == {"0": 4, "1": 4, "2": 4, "3": 4}
