"""What is done to a running study, as a table of names, how often, and functions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from tests.postgres import free_port
from tests.soak.lane import DISK, ROOT, Driver, Finding, Story
from tests.waiting import PATIENT


def one(story: Story) -> None:
    """One disturbance, drawn from those that the story can have."""
    possible = {name: weight for name, (weight, _, fits) in DISTURBANCES.items() if fits(story)}
    total = sum(possible.values())
    name = str(story.rng.choice([*possible], p=[weight / total for weight in possible.values()]))
    story.skew = float(story.rng.uniform(-1e5, 1e5)) if story.rng.random() < 0.2 else 0.0
    story.counts["clocks turned"] += bool(story.skew)
    DISTURBANCES[name][1](story)
    story.counts[name] += 1


def killed(story: Story) -> None:
    """SIGKILL at a random moment."""
    driver = story.start()
    story.run_on(driver)
    _kill(story, driver)


def interrupted(story: Story) -> None:
    """SIGTERM: a clean end that names the command which resumes."""
    driver = story.start()
    story.run_on(driver)
    driver.process.terminate()
    code, errors = driver.end()
    # Before the command line has its handlers, the signal itself ends it.
    if code not in (0, 130, -signal.SIGTERM):
        raise Finding(f"SIGTERM ended the driver with {code}: {errors[-300:]}")
    _no_traceback(errors)


def stopped_for_a_while(story: Story) -> None:
    """SIGSTOP, as a suspended machine, then on, then SIGKILL."""
    driver = story.start()
    story.run_on(driver)
    driver.process.send_signal(signal.SIGSTOP)
    time.sleep(float(story.rng.uniform(0.1, 1.0)))
    driver.process.send_signal(signal.SIGCONT)
    story.run_on(driver)
    _kill(story, driver)


def moved(story: Story) -> None:
    """The run folder gets another name between two drivers."""
    killed(story)
    if story.folder.exists():
        there = story.disk / f"run-{int(story.rng.integers(1 << 31))}"
        story.folder.rename(there)
        story.folder = there


def weights_changed(story: Story) -> None:
    """A byte of an expert changes: the driver must refuse, and go on once it is as before.

    Until a trial is measured, other weights are a study like any other.
    """
    killed(story)
    file = story.subject.weights
    assert file is not None
    if not story.measured():
        return
    before = file.read_bytes()
    place = len(before) - 1 - int(story.rng.integers(16))
    changed = bytearray(before)
    changed[place] ^= 0x41
    file.write_bytes(changed)
    try:
        code, errors = story.start().end()
    finally:
        file.write_bytes(before)
    if code != 2:
        raise Finding(f"a driver whose expert had changed ended with {code}: {errors[-300:]}")
    _no_traceback(errors)


def disk_filled(story: Story) -> None:
    """No room in the run folder, until the driver has ended or a while has passed."""
    driver = story.start()
    story.run_on(driver)
    filler = story.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    try:
        driver.process.wait(float(story.rng.uniform(1.0, 8.0)))
    except subprocess.TimeoutExpired:
        _kill(story, driver)
    else:
        code, errors = driver.end()
        if code not in (0, 1, 2):
            raise Finding(f"on a full disk the driver ended with {code}: {errors[-300:]}")
        _no_traceback(errors)
    finally:
        filler.unlink()


def database_restarted(story: Story) -> None:
    """The server crashes and starts again under the driver."""
    assert story.server is not None
    driver = story.start()
    story.run_on(driver)
    story.server.stop()
    time.sleep(float(story.rng.uniform(0.0, 2.0)))
    story.server.start()
    story.run_on(driver)
    _kill(story, driver)


def read_while_it_runs(story: Story) -> None:
    """`show` and `ls` of a run that goes on, which is then killed."""
    driver = story.start()
    story.run_on(driver)
    for words in (["show", str(story.folder), "--json"], ["ls", "runs", str(story.disk)]):
        code, errors = _command(words)
        if code not in (0, 2):
            raise Finding(f"{words[0]} ended with {code}: {errors[-300:]}")
        _no_traceback(errors)
    _kill(story, driver)


def dashboard_read(story: Story) -> None:
    """Pages of a dashboard on a run that goes on, which is then killed."""
    killed(story)
    if story.server is None and not story.lines():
        return
    driver = story.start()
    port = free_port()
    words = ["dashboard", str(story.folder), "--port", str(port)]
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "mergesearch", *words],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for page in ("/api/studies", "/report"):
            _get(f"http://127.0.0.1:{port}{page}", dashboard)
    finally:
        dashboard.terminate()
        dashboard.communicate(timeout=PATIENT)
    _kill(story, driver)


def _get(address: str, server: subprocess.Popen[str]) -> None:
    """Read a page, once the server listens."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=PATIENT) as answer:
                answer.read()
                return
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise Finding(f"{address} answered {error.code}: {error.read()[-300:]!r}") from None
            return  # a run without a report yet
        except OSError:
            time.sleep(0.1)
    _, errors = server.communicate()
    raise Finding(f"the dashboard ended: {errors[-300:]}")


def _kill(story: Story, driver: Driver) -> None:
    story.counts["kills"] += driver.kill()


def _command(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mergesearch", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENT,
    )  # fmt: skip
    return done.returncode, done.stderr


def _no_traceback(errors: str) -> None:
    if "Traceback" in errors:
        raise Finding(f"a traceback: {errors[-600:]}")


def _always(_: Story) -> bool:
    return True


#: Name -> how often beside the others, what is done, and which stories can have it.
DISTURBANCES: dict[str, tuple[float, Callable[[Story], None], Callable[[Story], bool]]] = {
    "SIGKILL": (10, killed, _always),
    "SIGTERM": (2, interrupted, _always),
    "stopped for a while": (1, stopped_for_a_while, _always),
    "run folder moved": (1, moved, _always),
    "expert changed": (1, weights_changed, lambda s: s.subject.weights is not None),
    f"disk of {DISK} filled": (1, disk_filled, lambda s: s.small),
    "database crashed": (3, database_restarted, lambda s: s.server is not None),
    "read while it runs": (0.7, read_while_it_runs, _always),
    "dashboard read": (0.5, dashboard_read, _always),
}
