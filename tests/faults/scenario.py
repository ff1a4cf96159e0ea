"""A sweep of 300 trials on four Ray nodes and PostgreSQL that meets every fault."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from mergesearch.search.record.trial_record import TrialRecord, Verdict
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run, open_run
from tests.cluster import ROOT, Cluster, running
from tests.commands import run_command
from tests.postgres import Gate, Server, serve
from tests.search.conftest import make_pico_items, make_pico_models, model_study
from tests.search.studies import spec_of, write_study
from tests.waiting import PATIENT, wait_for

TRIALS = 300
HOOKS = Path(__file__).parent / "hooks"


@dataclass
class Fault:
    """What was done, and what became of it.

    Attributes:
        name: For the report.
        results: Results recorded when it happened.
        seconds: From then to the next result.
    """

    name: str
    results: int
    seconds: float


@dataclass
class Story:
    """What is known at the end.

    Attributes:
        faults: In the order in which they were done.
        records, verdict: Of the finished run, read by the last driver's folder.
        undisturbed: The same study in one process, where nothing happened.
        said: What the drivers printed.
        left: Names of processes and files that should be gone and are not.
        changed: TrialResult trials that were lost or changed between two looks.
    """

    faults: list[Fault] = field(default_factory=list)
    records: list[TrialRecord] = field(default_factory=list)
    verdict: Verdict | None = None
    undisturbed: Run | None = None
    said: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class Sweep:
    """Drives the faults by the number of results in the database."""

    def __init__(self, folder: Path, cluster: Cluster, server: Server, gate: Gate) -> None:
        self.folder = folder
        self.cluster = cluster
        self.server = server
        self.gate = gate
        self.story = Story()
        self.database = server.database()
        models = folder / "models"
        items = folder / "items"
        make_pico_models(models)
        make_pico_items(items)
        self.data = model_study(
            models,
            items,
            name="faults",
            strategy="sobol",
            budget={"trials": TRIALS},
            driver={"lease_seconds": 20},
        )
        self.study = write_study(
            self.data | {"storage": server.url(gate.port, self.database)}, folder
        )
        self._known: dict[int, str] = {}

    def drive(self, name: str, skew: float) -> subprocess.Popen[str]:
        """Start a driver with a folder and a clock of its own, as on another host."""
        said = (self.folder / f"{name}.said").open("a")
        run = self.folder / name
        command = run_command(self.study, run, "--address", self.cluster.address)
        return subprocess.Popen(
            command,
            cwd=ROOT, env=self.cluster.environment | {"FAULT_SKEW": str(skew)},
            stdout=said, stderr=said, text=True,
        )  # fmt: skip

    def at(
        self, results: int, name: str, fault: Callable[[], object], process: subprocess.Popen[str]
    ) -> None:
        """Wait for so many results, inject the fault, and time the next result."""
        self.await_results(results, process)
        count = self.look()
        began = time.monotonic()
        fault()
        self.await_results(count + 1, process)
        self.story.faults.append(Fault(name, count, round(time.monotonic() - began, 1)))

    def await_results(self, count: int, process: subprocess.Popen[str]) -> None:
        """Wait for results."""
        wait_for(lambda: self.look() >= count, process, self.said)

    def look(self) -> int:
        """The number of results; notes those lost or changed since the last look."""
        query = (
            "SELECT t.number, t.state || a.value_json FROM trials t JOIN trial_system_attributes a "
            "USING (trial_id) "
            "WHERE t.state <> 'RUNNING' AND a.key = 'mergesearch:result'"
        )
        try:
            with psycopg.connect(
                self.server.address(self.database), connect_timeout=3
            ) as connection:
                now = dict(connection.execute(query).fetchall())
        except psycopg.errors.UndefinedTable:
            return 0
        for number, text in self._known.items():
            if now.get(number) != text:
                self.story.changed.append(f"trial {number}: {text} -> {now.get(number)}")
        self._known = now
        return len(now)

    def said(self) -> str:
        """What all drivers printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.said")))

    def arm(self, phase: str) -> None:
        """The next worker that reaches the phase dies in it."""
        armed = Path(self.cluster.environment["FAULTS"]) / f"kill-{phase}"
        armed.touch()
        wait_for(lambda: not armed.exists(), pause=0.05)

    def restart_server(self) -> None:
        """As in a crash."""
        self.server.stop()
        time.sleep(2)
        self.server.start()

    def cut(self, seconds: float) -> None:
        """The server cannot be reached for a while."""
        self.gate.cut()
        time.sleep(seconds)
        self.gate.open()


@contextlib.contextmanager
def small_disk(path: Path, size: str = "2m") -> Iterator[bool]:
    """A file system of its own at ``path``, where this process may make one; says whether it is."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], capture_output=True
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(path)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no room."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 1024)
    return filler


def tell(folder: Path) -> Story:
    """Run the whole story."""
    shm = set(os.listdir("/dev/shm"))
    (folder / "faults").mkdir()
    hooks = {"PYTHONPATH": f"{HOOKS}:{ROOT}", "FAULTS": str(folder / "faults"), "FAULT_SLOW": "1.0"}
    with serve() as server:
        hooks["PGPASSWORD"] = server.password
        with running(**hooks) as cluster, small_disk(folder / "second") as small:
            gate = Gate(server.port)
            sweep = Sweep(folder, cluster, server, gate)
            story = sweep.story
            cluster.start("head", 1)
            for name in ("n1", "n2", "n3"):
                cluster.start(name, 2)
            _all_faults(sweep, small)
            gate.cut()
            recorded = folder / "second" / "study.yaml"  # read past the gate
            recorded.write_text(recorded.read_text().replace(f":{gate.port}/", f":{server.port}/"))
            finished = open_run(folder / "second")
            story.records = finished.log.records
            story.verdict = finished.verdict
            story.said.append(sweep.said())
            story.undisturbed = run_study(spec_of(sweep.data, folder), folder / "undisturbed")
            cluster.stop()
            deadline = time.monotonic() + 30
            while cluster.processes() and time.monotonic() < deadline:
                time.sleep(0.5)
            story.left += [" ".join(process.cmdline()[:3]) for process in cluster.processes()]
    story.left += sorted(
        name for name in set(os.listdir("/dev/shm")) - shm if not _of_another(name)
    )
    return story


def _of_another(name: str) -> bool:
    """Whether a shared-memory file names a living process, which is then not of the cluster."""
    numbers = (int(number) for number in re.findall(r"\d+", name))
    return any(number < 1 << 31 and psutil.pid_exists(number) for number in numbers)


def _all_faults(sweep: Sweep, small: bool) -> None:
    cluster = sweep.cluster
    story = sweep.story
    first = sweep.drive("first", skew=-3600)
    sweep.await_results(20, first)
    for results, phase in ((30, "merge"), (50, "evaluate"), (70, "report")):
        sweep.at(results, f"worker killed in {phase}", lambda phase=phase: sweep.arm(phase), first)
    sweep.at(90, "node killed", lambda: cluster.kill("n1"), first)
    sweep.await_results(110, first)
    first.kill()
    first.wait()
    results = sweep.look()
    began = time.monotonic()
    second = sweep.drive("second", skew=3600)
    sweep.await_results(results + 1, second)
    name = "driver killed, another host goes on, clocks two hours apart"
    story.faults.append(Fault(name, results, round(time.monotonic() - began, 1)))
    sweep.at(150, "node joined", lambda: cluster.start("n4", 2), second)
    sweep.at(170, "PostgreSQL crashed and restarted", sweep.restart_server, second)
    sweep.at(200, "PostgreSQL unreachable for 20 s", lambda: sweep.cut(20), second)
    if small:
        sweep.at(250, "run folder full", lambda: fill(sweep.folder / "second"), second)
    assert second.wait(PATIENT) == 0, sweep.said()
    if small:
        (sweep.folder / "second" / "filler").unlink()
        again = sweep.drive("second", skew=0)
        assert again.wait(PATIENT) == 0, sweep.said()
