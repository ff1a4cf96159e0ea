"""Runs a soak: ``python -m tests.soak.run --minutes 120 --seed 0``.

Two lanes, one process each, take studies in turn until the time is over; a lane has models, a
database server and a small file system of its own. It ends with counts, and with a command for
every finding; exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from tests.postgres import Server, programs, serve
from tests.soak import disturbances
from tests.soak.lane import Story, tell
from tests.soak.subjects import prepare, subjects

LANES = 2
#: Share of studies whose records are in PostgreSQL, where it is installed.
DATABASES = 0.15


@dataclass
class Outcome:
    """What a lane did.

    Attributes:
        counts: Name of a disturbance, ``kills`` or ``studies`` -> how many.
        told: Names of studies that were begun.
        findings: A line for each: the command that shows it again, and what was found.
    """

    counts: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)


def tell_one(index: int, seed: int, folder: Path, server: Server | None, outcome: Outcome) -> None:
    """Tell the story of a number, from which its study, its disturbances and moments are drawn."""
    rng = np.random.default_rng([seed, index])
    every = subjects(folder)
    order = np.random.default_rng([seed, index // len(every)]).permutation(len(every))
    subject = every[order[index % len(every)]]
    kept = server if rng.random() < DATABASES else None
    scratch = Path(tempfile.mkdtemp(prefix=f"story-{index}-", dir=folder))
    story = Story(subject, scratch, rng, kept, outcome.counts)
    outcome.told.add(subject.name)
    try:
        tell(story, disturbances)
    except Exception as error:
        again = f"python -m tests.soak.run --seed {seed} --story {index}"
        what = "".join(traceback.format_exception_only(error)).strip()
        outcome.findings.append(f"{again}\n    {subject.name}: {what}\n    kept in {scratch}")
        print(outcome.findings[-1], flush=True)


def run_lane(lane: int, seed: int, until: float, prepared: Path) -> Outcome:
    """Tell the stories of one lane until the time is over."""
    outcome = Outcome()
    folder = prepared.parent / f"lane-{lane}"
    shutil.copytree(prepared, folder)
    with _server() as server:
        for index in range(lane, 1 << 31, LANES):
            if time.time() > until:
                return outcome
            tell_one(index, seed, folder, server, outcome)
            print(
                f"lane {lane}: {outcome.counts['studies']} studies, {outcome.counts['kills']} "
                f"kills, {len(outcome.findings)} findings",
                flush=True,
            )
    return outcome


@contextlib.contextmanager
def _server() -> Iterator[Server | None]:
    if programs() is None:
        yield None
        return
    with serve() as server:
        yield server


def soak(minutes: float, seed: int, root: Path) -> Outcome:
    """Run all lanes.

    Args:
        minutes: After so long no new story begins.
        seed: Of every choice.
        root: An empty folder; what belongs to findings stays in it.
    """
    until = time.time() + 60 * minutes
    (root / "prepared").mkdir()
    prepare(root / "prepared")
    whole = Outcome()
    with ProcessPoolExecutor(LANES, mp_context=get_context("spawn")) as pool:
        lanes = [
            pool.submit(run_lane, lane, seed, until, root / "prepared") for lane in range(LANES)
        ]
        for each in lanes:
            outcome = each.result()
            whole.counts += outcome.counts
            whole.told |= outcome.told
            whole.findings += outcome.findings
    return whole


def main() -> None:
    """Run as the arguments say, and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--story", type=int, help="tell only this one")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="ms-soak-"))
    if arguments.story is None:
        outcome = soak(arguments.minutes, arguments.seed, root)
    else:
        outcome = Outcome()
        (root / "lane").mkdir()
        prepare(root / "lane")
        with _server() as server:
            tell_one(arguments.story, arguments.seed, root / "lane", server, outcome)
    print(f"{len(outcome.told)} different studies")
    for name, count in sorted(outcome.counts.items()):
        print(f"{count:6d}  {name}")
    print(f"{len(outcome.findings)} findings", *outcome.findings, sep="\n")
    if outcome.findings:
        raise SystemExit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
