"""Writes docs/faults.md: what was done to a sweep, and what became of it.

Run it with ``python -m tests.faults.report``; it takes about four minutes on two cores.
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path

import psutil

from mergesearch.merging.checkpoints.atomic import write_atomically
from tests.cluster import ROOT
from tests.faults.scenario import TRIALS, Story, tell

PAGE = ROOT / "docs" / "faults.md"


def page(story: Story, seconds: float) -> str:
    """The report in Markdown."""
    assert story.undisturbed is not None
    assert story.verdict is not None
    tells = [record.tell_index for record in story.records if record.tell_index is not None]
    expected = [
        (r.number, r.recipe.digest, r.state, tuple(r.values.items()))
        for r in story.undisturbed.log.records
    ]
    found = [(r.number, r.recipe.digest, r.state, tuple(r.values.items())) for r in story.records]
    differ = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    other = story.undisturbed.verdict
    assert other is not None
    facts = {
        "results lost or changed between any two reads of the database": len(story.changed),
        "results recorded twice": len(tells) - len(set(tells)),
        "trials that differ from the same study in one undisturbed process, to the bit": differ,
        "winner": f"trial {story.verdict.winner}, undisturbed trial {other.winner}",
        "processes and shared-memory files left behind": ", ".join(story.left) or "none",
    }
    machine = f"{psutil.cpu_count()} cores, {platform.system()}"
    lines = [
        "# Fault injection",
        "",
        f"A sweep of {TRIALS} trials merges real checkpoints on four Ray nodes and records them in",
        f"PostgreSQL, with real processes on one machine ({machine}). `make faults` writes this",
        "page; `make test-slow` runs the same story and asserts what the page says.",
        "",
        "| fault | results recorded by then | seconds to the next result |",
        "|---|---|---|",
        *(f"| {fault.name} | {fault.results} | {fault.seconds:.1f} |" for fault in story.faults),
        "",
        f"The {len(story.records)} trials took {seconds:.0f} s, servers and nodes included. An",
        "evaluation takes a second, and five to seven workers run at a time.",
        "",
        "| what must hold | found |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "Each driver had a run folder of its own, as on another host; that of the second one was",
        "on a file system of 2 MB, which was filled. One clock was an hour ahead, another an hour",
        "behind. `tests/search/study/test_kill.py` has 50 randomised kill schedules of a driver on",
        "a journal, and `tests/search/record/test_postgres.py` tests lost answers to commits.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Tell the story and write the page."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ms-faults-") as name:
        story = tell(Path(name))
        text = page(story, time.monotonic() - began)
    write_atomically(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
