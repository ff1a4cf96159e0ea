"""Workers that share a pretend card read one copy of base and rows, and outlive its loss."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mergesearch.merging.errors import MergesearchError
from mergesearch.merging.resident.sharing.copies import AttachedCopy, HeldCopy, card_identity
from mergesearch.merging.resident.sharing.protocol import SharingError, Wanted
from mergesearch.merging.resident.upload import SMALL, copy_bytes
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run, open_run
from tests.cluster import ROOT, Cluster, running
from tests.commands import run_command
from tests.pretend.device import NAME, Cards
from tests.pretend.test_study import cards_of, study
from tests.search.studies import spec_of, write_study
from tests.waiting import PATIENT, wait_for

__all__ = ["study"]


@pytest.mark.parametrize("size", [SMALL, SMALL + 1, 3 * SMALL, 3 * SMALL + 77])
def test_an_upload_takes_nothing_of_the_card_beside_its_target(cards: Cards, size: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    told: list[int] = []
    with cards.counting() as counted, cards.peak() as peak:
        target = torch.empty(size, dtype=torch.uint8, device=NAME)
        copy_bytes(source, target, told.append, chunk=SMALL)
    assert np.array_equal(target.cpu().numpy(), source)
    assert peak == [size]
    assert counted.host_to_device == size
    assert told == [*range(SMALL, size, SMALL), size]


def test_a_copy_belongs_to_its_card(cards: Cards, tmp_path: Path) -> None:
    source = np.arange(100, dtype=np.uint8)
    first = HeldCopy("key.content", 100, NAME, tmp_path)
    assert first.memory.device == torch.device(NAME, 0)
    first.close()
    held = HeldCopy("key.content", 100, f"{NAME}:1", tmp_path)
    copy_bytes(source, held.memory)
    handle = held.offer()
    assert handle.card.card == "GPU PRETEND-1"
    with pytest.raises(SharingError, match=r"expected card GPU PRETEND-0 of .*GPU PRETEND-1"):
        AttachedCopy(handle, Wanted(card_identity(NAME), "key.content", 100), NAME)
    wanted = Wanted(card_identity(f"{NAME}:1"), "key.content", 100)
    attached = AttachedCopy(handle, wanted, f"{NAME}:1")
    assert attached.memory.device == torch.device(NAME, 1)
    assert torch.equal(attached.memory.cpu(), torch.from_numpy(source))
    held.close()


@dataclass
class Seen:
    """What a look at the processes of a cluster finds.

    Attributes:
        holders: Processes that hold a copy.
        readers: File of a copy -> processes that have it mapped.
        inodes: File of a copy -> device and inode of it in all of them.
    """

    holders: set[int] = field(default_factory=set)
    readers: dict[str, set[int]] = field(default_factory=dict)
    inodes: dict[str, set[tuple[str, str]]] = field(default_factory=dict)

    def look(self, cluster: Cluster) -> Seen:
        """Look, and add what is there."""
        for process in cluster.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if "RemoteHolder.hold" in " ".join(process.cmdline()):
                    self.holders.add(process.pid)
                for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                    if ".memory" in line:
                        _, _, _, device, inode, path = line.split(maxsplit=5)
                        path = path.removesuffix(" (deleted)")
                        self.readers.setdefault(path, set()).add(process.pid)
                        self.inodes.setdefault(path, set()).add((device, inode))
        return self


@pytest.fixture(scope="module")
def one_card() -> Iterator[Cluster]:
    """A cluster of one node with one card."""
    with running(PRETEND_CARDS="1") as started:
        started.start("head", 2, "--num-gpus=1")
        yield started


@pytest.fixture(scope="module")
def long_study(study: dict[str, Any]) -> dict[str, Any]:
    return study | {"strategy": "sobol", "budget": {"trials": 1200}}


@pytest.fixture(scope="module")
def undisturbed(long_study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    alone = long_study | {"workers": {"backend": "inline"}}
    return run_study(spec_of(alone, folder), folder / "run")


def values_of(run: Run) -> dict[str, Any]:
    return {record.recipe.digest: record.values for record in run.log.records}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("killed", [False, True], ids=["a worker", "the holder"])
def test_workers_of_a_card_read_one_copy_and_lose_nothing_when_one_or_all_die(
    one_card: Cluster,
    long_study: dict[str, Any],
    undisturbed: Run,
    tmp_path: Path,
    killed: bool,
) -> None:
    workers = {"per_gpu": 2, "cpus": 0.5, "cache": str(tmp_path / "cache")}
    file = write_study(long_study | {"workers": workers}, tmp_path)
    folder = tmp_path / "run"
    seen = Seen()
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            run_command(file, folder, "--address", one_card.address),
            cwd=ROOT, env=one_card.environment, stderr=said, stdout=said,
        )  # fmt: skip
    try:
        wait_for(lambda: ended(folder) > 5, process, (tmp_path / "said").read_text)
        wait_for(lambda: readers(seen.look(one_card)) == [3], process)  # holder and two workers
        assert len(seen.holders) == 1
        (holder,) = seen.holders
        ((copy, of_first),) = seen.readers.items()
        of_first = set(of_first)
        if killed:
            os.kill(holder, signal.SIGKILL)
            wait_for(lambda: len(seen.look(one_card).holders) == 2, process)
        else:
            os.kill(min(of_first - {holder}), signal.SIGKILL)
            wait_for(lambda: readers(seen.look(one_card)) == [4], process)  # and its successor
        assert process.wait(PATIENT) == 0, (tmp_path / "said").read_text()
    finally:
        process.kill()
    found = open_run(folder)
    assert values_of(found) == values_of(undisturbed)
    assert all(record.state == "complete" for record in found.log.records)
    assert cards_of(found) == {"pretend card 0"}
    lost = (tmp_path / "said").read_text().count("were lost with the process that held them")
    assert lost == (1 if killed else 0)
    assert [len(each) for each in seen.inodes.values()] == [1] * (1 + killed), "one file each"
    if killed:
        assert seen.readers[copy] == of_first, "none of them went on to the next copy"
        (others,) = (pids for file, pids in seen.readers.items() if file != copy)
        assert not others & of_first


def readers(seen: Seen) -> list[int]:
    """Number of processes that have mapped each copy."""
    return [len(processes) for processes in seen.readers.values()]


def ended(folder: Path) -> int:
    """Number of trials that have ended so far."""
    try:
        return sum(record.values is not None for record in open_run(folder).log.records)
    except MergesearchError:
        return 0
