"""A process run to its end, with the memory and the bytes that Linux counts for it.

The system keeps these counts all the time; they are looked at twenty times a second, so that a peak
of less than 50 ms may be missed. Children are not counted: none of the tools has any.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two looks.
PAUSE = 0.05


@dataclass(frozen=True)
class Use:
    """What a process used.

    Attributes:
        peak: Bytes of the largest resident set, mapped files included.
        own: Most bytes of memory of its own (anonymous), which only the process can give back.
        mapped: Most bytes of files, and of memory shared through files, that were mapped and
            touched; the system can take pages of files away where it needs them.
        read: Bytes read by calls; what is read by mapping is in ``mapped``.
        written: Bytes of pages that the process made dirty, by calls or in mapped files.
        cpu: CPU seconds.
    """

    peak: int
    own: int
    mapped: int
    read: int
    written: int
    cpu: float


def run_watched(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> Use:
    """Run a program in a folder, its output into a file, and say what it used.

    Raises:
        RuntimeError: If it fails.
    """
    counts = {"RssAnon": 0, "RssFile + RssShmem": 0, "rchar": 0, "write_bytes": 0}
    with log.open("w") as out:
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, counts, ended))
        watcher.start()
        # Until it is waited for, what it used can still be read.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        ended.set()
        watcher.join()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {log.read_text()[-2000:]}")
    return Use(
        1024 * used.ru_maxrss,
        counts["RssAnon"],
        counts["RssFile + RssShmem"],
        counts["rchar"],
        counts["write_bytes"],
        used.ru_utime + used.ru_stime,
    )


def _watch(pid: int, counts: dict[str, int], ended: threading.Event) -> None:
    """Keep the largest of every count until the process has ended."""
    while True:
        last = ended.wait(PAUSE)
        status = _fields(Path(f"/proc/{pid}/status"))
        seen = _fields(Path(f"/proc/{pid}/io"))
        if "RssAnon" in status:  # gone once the process has ended
            seen["RssAnon"] = 1024 * status["RssAnon"]
            seen["RssFile + RssShmem"] = 1024 * (status["RssFile"] + status["RssShmem"])
        for name in counts:
            counts[name] = max(counts[name], seen.get(name, 0))
        if last:
            return


def _fields(file: Path) -> dict[str, int]:
    """The whole numbers of a file of ``name: number`` lines; empty where it cannot be read."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    words = {name: rest.split() for name, rest in pairs}
    return {name: int(rest[0]) for name, rest in words.items() if rest and rest[0].isdigit()}
