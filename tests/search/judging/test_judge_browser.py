"""A person's way: a study in a process of its own, judged in a real browser, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.search.judging.address import read_address
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.judging.serving import served
from tests.browser import CHROMIUM, Browser, browsing
from tests.commands import run_command
from tests.search.judging.judged import judged_study, make_home
from tests.search.report.test_report_browser import DESK, FAINT, PHONE
from tests.waiting import PATIENT, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    pytest.mark.xdist_group("judging in a browser"),
]
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}
HOSTILE = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script> & "more"'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    """Drivers that were started; those that a failed test leaves behind end with it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(drivers: list[subprocess.Popen[str]], study: Path, folder: Path) -> subprocess.Popen[str]:
    """A driver in a process of its own, once it serves the page at a new address."""
    before = read_address(folder)  # of a driver that was killed
    path = folder.parent / "log"
    with path.open("a") as log:
        process = subprocess.Popen(run_command(study, folder), stdout=log, stderr=log, text=True)
    drivers.append(process)
    wait_for(lambda: read_address(folder) not in (None, before), process, path.read_text)
    return process


def state(browser: Browser) -> dict[str, Any]:
    return dict(browser.run("({...document.body.dataset})"))


def shown_text(browser: Browser, place: str) -> str:
    return str(browser.run(f"document.getElementById('{place}').textContent"))


def judge(browser: Browser, process: subprocess.Popen[str], most: int | None = None) -> int:
    """Press the key of the longer text until the study is over; how many pairs were judged."""
    count = 0
    while most is None or count < most:
        # A page whose script has not run yet has no state.
        wait_for(lambda: state(browser).get("state", "waiting") != "waiting", pause=0.02)
        if state(browser)["state"] == "over":
            break
        pair = state(browser)["pair"]
        left, right = (len(shown_text(browser, side)) for side in ("left", "right"))
        browser.press(KEYS["tie" if left == right else "left" if left > right else "right"])
        browser.until(f"document.body.dataset.pair !== '{pair}'")
        count += 1
    return count


def test_a_study_is_judged_by_keys_killed_and_resumed(
    tmp_path: Path, browser: Browser, drivers: list[subprocess.Popen[str]]
) -> None:
    home = make_home(tmp_path)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(judged_study(home, budget={"trials": 3})))
    folder = tmp_path / "run"
    process = start(drivers, study, folder)
    told = subprocess.run(
        [sys.executable, "-m", "mergesearch", "judge", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    url = told.stdout.strip()
    assert f"judging: judge at {url}" in (tmp_path / "log").read_text()
    browser.open(url)
    assert judge(browser, process, most=4) == 4
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENT)
    browser.until("document.body.dataset.state === 'over'")
    process = start(drivers, study, folder)
    browser.open(str(read_address(folder)))
    browser.until("document.body.dataset.state === 'open'")
    assert shown_text(browser, "progress").startswith("4 of ")
    rest = judge(browser, process)
    assert process.wait(PATIENT) == 0, (tmp_path / "log").read_text()
    events = [json.loads(line) for line in (folder / "judging.jsonl").read_text().splitlines()]
    pairs = [event["pair"] for event in events if event["event"] == "choice"]
    assert len(pairs) == len(set(pairs)) == 4 + rest
    report = json.loads((folder / "report.json").read_text())
    assert "preference" in json.dumps(report)
    assert read_address(folder) is None


def test_an_interrupt_stops_a_study_that_waits_for_choices(
    tmp_path: Path, drivers: list[subprocess.Popen[str]]
) -> None:
    home = make_home(tmp_path)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(judged_study(home)))
    process = start(drivers, study, tmp_path / "run")
    wait_for(lambda: "pairs to judge at" in (tmp_path / "log").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENT) == 130
    assert "resumes from here" in (tmp_path / "log").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(JudgingRecord(tmp_path), 0)
    for recipe in ("base", "other"):
        outputs = (
            Output(HOSTILE, "text", f"{HOSTILE} {recipe} {'long ' * 300}".encode()),
            Output("two", "text", f"{'w' * 500} {recipe}".encode()),
            Output("three", "text", b"" if recipe == "base" else b"something"),
        )
        bench.register(
            "preference", "search", recipe, Exhibit("Which?", 3, outputs), base=recipe == "base"
        )
    return bench


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_right_at_both_widths(
    bench: Bench, browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    with served(bench, 0, lambda: None, "driver.judge_port") as url:
        browser.dark(dark)
        browser.open(url, width=width, height=800)
        for done in range(3):
            browser.until(f"document.body.dataset.state === 'open' && view.done === {done}")
            # Foreign text is text, and nothing is wider than the page.
            assert browser.run("window.hurt") is None
            width_used = browser.run("document.documentElement.scrollWidth")
            assert width_used <= width
            assert browser.run(FAINT.replace("main *", "body *")) == []
            # The buttons are in the window, also where the texts are longer than that.
            box = browser.run(
                "(({left, right, top, bottom}) => [left, right, top, bottom])"
                "(document.getElementById('choose-right').getBoundingClientRect())"
            )
            left, right, top, bottom = box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= 800
            if done == 0:
                assert shown_text(browser, "prompt") == HOSTILE
            browser.picture(tmp_path / f"{done}.png")
            browser.click((left + right) / 2, (top + bottom) / 2)
        browser.until("document.body.dataset.state === 'waiting'")
        browser.run("document.getElementById('undo').focus()")
        browser.press("Enter")
        browser.until("document.body.dataset.state === 'open'")
        assert shown_text(browser, "progress").startswith("2 of 3")
        assert browser.complaints == []
        assert all(address.startswith((url, "data:")) for address in browser.requests)
        # Every control is reached by Tab.
        reached = set()
        for _ in range(6):
            browser.press("Tab")
            reached.add(browser.run("document.activeElement.id"))
        assert {"choose-left", "choose-tie", "choose-right"} <= reached
