"""One study at a time: begun, disturbed until its seed is content, resumed, and compared."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.merging.errors import StudyFailedError
from mergesearch.search.record.trial_record import Verdict
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run, open_run
from tests.commands import run_command
from tests.postgres import Server
from tests.search.studies import fingerprint, spec_of, write_study
from tests.soak.subjects import Subject
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "tests" / "faults" / "hooks"
#: Size of the file system on which every run folder lies, so that a disturbance can fill it.
DISK = "64m"


class Finding(AssertionError):
    """A promise that did not hold."""


@dataclass
class Driver:
    """A running ``mergesearch run``."""

    process: subprocess.Popen[str]

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Exit code and messages, once it has ended."""
        _, errors = self.process.communicate(timeout=PATIENT)
        return self.process.returncode, errors

    def kill(self) -> bool:
        """Send SIGKILL; says whether it hit a live driver."""
        self.process.kill()
        return self.end()[0] == -signal.SIGKILL


@dataclass
class Story:
    """A study under disturbances.

    Attributes:
        subject: The study.
        scratch: A folder of its own.
        rng: Every choice comes from here.
        server: Records are kept there; None keeps them in the run folder.
        counts: What was done.
        disk: Where the run folder lies: a small file system, where one may be mounted.
    """

    subject: Subject
    scratch: Path
    rng: np.random.Generator
    server: Server | None
    counts: Counter[str] = field(default_factory=Counter)
    small: bool = False
    skew: float = 0.0

    def __post_init__(self) -> None:
        self.disk = self.scratch / "disk"
        self.folder = self.disk / "run"
        self._known: dict[int, tuple[Any, ...]] = {}
        self.study = self.scratch / "study.yaml"

    def expect(self) -> tuple[list[tuple[Any, ...]], Verdict | None]:
        """Trials and verdict of the study that nobody disturbs, in this process.

        Seeds whose only anchor meets a fault of the evaluator have no winner, and are passed over.
        """
        while True:
            data = self.subject.make() | {"seed": int(self.rng.integers(1 << 31))}
            try:
                run = run_study(spec_of(data, self.scratch), self.scratch / "undisturbed")
            except StudyFailedError:
                shutil.rmtree(self.scratch / "undisturbed")
                continue
            break
        if self.server is not None:
            data["storage"] = self.server.url(database=self.server.database())
        write_study(data, self.scratch)
        return fingerprint(run), run.verdict

    def start(self) -> Driver:
        """Begin or resume the run."""
        environment = {
            "PYTHONPATH": f"{HOOKS}:{ROOT}",
            "FAULT_SKEW": str(self.skew),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            run_command(self.study, self.folder),
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Driver(process)

    def lines(self) -> int:
        """Lines of the journal; none where records are in a database."""
        with contextlib.suppress(OSError):
            return (self.folder / "journal.log").read_bytes().count(b"\n")
        return 0

    def measured(self) -> bool:
        """Whether a trial was measured; False where records are in a database."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "journal.log").read_bytes().splitlines()
            return any(b'"op_code":6' in line and b'"state":1' in line for line in lines)
        return False

    def run_on(self, driver: Driver) -> None:
        """Let the driver record a few more results, or only start up."""
        if self.server is not None or self.rng.random() < 0.2:
            self._let_go(driver, float(self.rng.uniform(0.0, 6.0)))
            return
        more = self.lines() + int(self.rng.integers(1, 60))
        while driver.alive and self.lines() < more:
            time.sleep(0.002)
        self._let_go(driver, float(self.rng.uniform(0.0, 0.03)))

    def _let_go(self, driver: Driver, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.process.wait(seconds)

    def look(self) -> None:
        """Check that no finished trial was lost or changed since the last look."""
        run = self.opened()
        now = {} if run is None else {e[0]: e for e in fingerprint(run) if e[5] != "running"}
        for number, entry in self._known.items():
            if now.get(number) != entry:
                raise Finding(f"trial {number} was {entry}, is {now.get(number)}")
        self._known = now

    def opened(self) -> Run | None:
        """The run, unless it was killed before it existed."""
        if self.server is None and not self.lines():
            return None
        try:
            return open_run(self.folder)
        except Exception:
            if self._known:
                raise
            return None


def tell(story: Story, disturbances: Any) -> None:
    """Disturb a study until its seed is content, let it end, and compare it.

    Raises:
        Finding: If a promise does not hold.
    """
    expected, verdict = story.expect()
    with _small_disk(story):
        for _ in range(int(story.rng.integers(3, 10))):
            disturbances.one(story)
            story.look()
            if len(story._known) == len(expected):
                break
        story.skew = 0.0
        code, errors = story.start().end()
        if code:
            raise Finding(f"the last resume ended with {code}: {errors[-300:]}")
        run = open_run(story.folder)
        found = fingerprint(run)
        if found != expected:
            first = next(
                (a, b) for a, b in zip([*found, None], [*expected, None], strict=False) if a != b
            )
            raise Finding(f"trials differ from an undisturbed run: {first}")
        if run.verdict != verdict:
            raise Finding(f"the verdict is {run.verdict}, undisturbed {verdict}")
    story.counts["studies"] += 1
    shutil.rmtree(story.scratch)


@contextlib.contextmanager
def _small_disk(story: Story) -> Any:
    story.disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(story.disk)]
    story.small = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.copytree(story.folder, story.scratch / "found")
        raise
    finally:
        if story.small:
            subprocess.run(["umount", "-l", str(story.disk)], check=True)
