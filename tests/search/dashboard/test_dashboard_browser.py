"""The dashboard in a real browser: behind a token, and with bounds."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.search.dashboard.test_dashboard import OBJECTIVES, TOKEN, ask, serving, write_trials

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
    "--dump-dom",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]


@pytest.fixture
def page(tmp_path: Path) -> Callable[[str], str]:
    """The page at a URL as a new browser shows it once its scripts have run."""

    def opened(url: str) -> str:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return opened


@pytest.fixture
def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/team.db"
    # 0 is better than all others and misses the bound.
    results = [([0.9, 0.1], 0.5), ([0.8, 0.2], -1.0), ([0.7, 0.3], 0.0)]
    write_trials(url, OBJECTIVES, results, name="bounded digits")
    write_trials(url, OBJECTIVES[:1], [([0.9], 0.5), ([0.8], -1.0)], name="letters")
    return url


def test_the_token_opens_the_list_of_studies(page, database):
    with serving(database, token=TOKEN) as url:
        assert "bounded digits" not in page(url)
        shown = page(f"{url}dashboard?token={TOKEN}")
        assert "bounded digits" in shown
        assert "letters" in shown
        assert TOKEN not in shown


@pytest.mark.parametrize(("name", "best"), [("bounded digits", 1), ("letters", 1)])
def test_a_study_shows_the_best_of_those_that_keep_the_bound(page, database, name, best):
    with serving(database) as url:
        studies = json.loads(ask(f"{url}api/studies")[2])["study_summaries"]
        study = next(study["study_id"] for study in studies if study["study_name"] == name)
        shown = page(f"{url}dashboard/studies/{study}")
        assert name in shown
        assert re.findall(r"Best Trial \(number=(\d+)\)", shown) == [str(best)]
