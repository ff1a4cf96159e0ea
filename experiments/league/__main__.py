"""The league, as one command that resumes where it was stopped.

``python -m experiments.league --size small|full [--only NAME ...]``

Every match is played once; its result is a line of ``runs/league/results.jsonl``. The tables go
into ``experiments/league/README.md``, between their marks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from experiments.league.cells import SIZES, Size
from experiments.league.contestants import Contestant, contestants
from experiments.league.library_player import install
from experiments.league.matches import Match, run_match
from experiments.league.results import (
    RESULTS,
    Result,
    append_result,
    current_commit,
    read_results,
)
from experiments.league.tables import finished, tables
from experiments.running import ROOT, write_between

README = ROOT / "experiments" / "league" / "README.md"
START = "<!-- table SIZE: written by the command above -->"
STOP = "<!-- end of table SIZE -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--only", nargs="+", default=[], help="contestants; the table has all")
    parser.add_argument("--cheap", action="store_true", help="leave out those that think long")
    parser.add_argument("--cells", default="", help="play only cells whose name holds this")
    parser.add_argument("--seeds", type=int, help="of every cell (default: those of the size)")
    parser.add_argument("--again", action="store_true", help="play what has a result once more")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="play nothing, write the table")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    seeds = options.seeds or size.seeds
    players = {player.name: player for player in contestants()}
    unknown = set(options.only) - set(players)
    if unknown:
        parser.error(f"expected contestants among {sorted(players)}, received {sorted(unknown)}")
    chosen = [
        player
        for name, player in players.items()
        if not (options.cheap and player.slow) and (not options.only or name in options.only)
    ]
    if not options.table:
        known = {} if options.again else read_results()
        todo = [
            match
            for match in _matches(chosen, size, seeds)
            if match.key not in known and options.cells in match.cell.name
        ]
        if any(match.contestant.library for match in todo):
            install()
        _play_all(todo, options.processes)
    cells = {cell.name for cell in size.cells}
    rows = finished(read_results().values(), cells, seeds)
    text = tables(_in_order(rows, size), players, options.size)
    print(text)
    start = START.replace("SIZE", options.size)
    if start in README.read_text():
        write_between(README, start, STOP.replace("SIZE", options.size), text)


def _matches(chosen: Sequence[Contestant], size: Size, seeds: int) -> Iterator[Match]:
    """Seed after seed, so that a league that is cut short has whole seeds."""
    for seed in range(seeds):
        for cell in size.cells:
            for player in chosen:
                if player.plays(cell.setup):
                    yield Match(player, cell, seed, size.cpu_limit)


def _play_all(todo: Sequence[Match], processes: int) -> None:
    """Play matches, some at a time on one thread each, and keep what is finished."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    commit = current_commit()
    begun = time.monotonic()
    waiting: dict[Future[Result], Match] = {}
    done = 0
    queue = list(reversed(todo))
    print(f"{len(todo)} matches to play; results go to {RESULTS.relative_to(ROOT)}", flush=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        while queue or waiting:
            while queue and len(waiting) < 2 * processes:
                match = queue.pop()
                waiting[pool.submit(run_match, match, commit)] = match
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                done += 1
                left = (time.monotonic() - begun) / done * (len(todo) - done)
                _keep(future, waiting.pop(future), f"{done}/{len(todo)}, {left / 60:.0f} min left")


def _keep(future: Future[Result], match: Match, progress: str) -> None:
    """Append a result; a match that fails is reported, and played again next time."""
    error = future.exception()
    if error is not None:
        print(f"FAILED {match.title}: {type(error).__name__}: {error}", flush=True)
        return
    append_result(future.result())
    print(f"{progress}  {match.title}", flush=True)


def _in_order(rows: Sequence[Result], size: Size) -> list[Result]:
    order = [cell.name for cell in size.cells]
    return sorted(rows, key=lambda row: order.index(row.cell))


if __name__ == "__main__":
    main()
