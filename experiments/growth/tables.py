"""Tables of experiment 25 as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.growth.plots import Line
from mergesearch.search.grammar import counted

Figures = Mapping[str, Any]


def tables(kept: Figures) -> str:
    """Tables of all parts that are kept."""
    makers: Mapping[str, Callable[[Figures], str]] = {
        "merges": merges,
        "sparse": sparse,
        "driver": driver,
        "workers": workers,
        "cluster": cluster,
    }
    return "\n\n".join(make(kept[part]) for part, make in makers.items() if part in kept)


def merges(figures: Figures) -> str:
    """Time of merges of random rows."""
    sizes, seconds = zip(*figures["parameters"], strict=True)
    shown = ", ".join(f"{n / 1e6:g}M: {s:.3g}" for n, s in figures["parameters"])
    slope = Line("", sizes, seconds).slope
    rows = [["fp32 rows, 4 experts, parameters", shown, "size^1", f"size^{slope:.2f}"]]
    experts = figures["experts"]
    names = {"fp32": "fp32 rows", "bf16": "stored bf16", "apart": "stored bf16, pages apart"}
    for kind, name in names.items():
        pairs = zip(experts, figures[kind], strict=True)
        shown = ", ".join(f"{k}: {s:.3g}" for k, s in pairs)
        slope = Line("", [k + 2 for k in experts], figures[kind]).slope
        what = f"{name}, {figures['size'] / 1e6:.0f}M parameters, experts"
        rows.append([what, shown, "(K + 2)^1", f"(K + 2)^{slope:.2f}"])
    return _table(["merge of", "CPU seconds", "expected", "measured"], rows)


def sparse(figures: Figures) -> str:
    """Merges of checkpoints that are holes."""
    titles = ["checkpoints of holes, bf16", "headers, s", "arena prepared, s", "mapped again, s"]
    titles += ["arena, MB", "merge, CPU s", "merged, anonymous MB"]
    rows = [
        [
            f"{row['parameters'] / 1e6:,.0f}M, {counted(row['experts'], 'expert')}",
            f"{row['headers_seconds']:.3f}",
            f"{row['prepare_seconds']:.1f}",
            f"{row['open_seconds']:.2f}",
            f"{row['arena_mb']:,.0f}",
            f"{row['merge_seconds']:.3g}",
            f"{row['merged_mb']:,.0f}",
        ]
        for row in (*figures["parameters"], *figures["experts"])
    ]
    return _table(titles, rows)


def driver(figures: Figures) -> str:
    """What the driver takes for a trial."""
    titles = ["driver", "CPU ms a trial", "journal kB", "memory kB", "winner and report, CPU s"]
    titles.append("opening, CPU s")
    cases = [
        (f"{strategy}, {row['dimensions']} dimensions, {row['trials']:,} trials", row)
        for strategy, rows in (*figures["dimensions"].items(), ("cma_es", figures["trials"]))
        for row in rows
    ]
    rows = [
        [
            name,
            f"{row['milliseconds']:.2f}",
            f"{row['kilobytes']:.1f}",
            f"{row['memory']:.1f}" if row["trials"] >= 1000 else "",
            f"{row['ending']:.1f}",
            f"{row['opening']:.1f}",
        ]
        for name, row in cases
    ]
    listed = ", ".join(f"{name} {share:.0%}" for name, share in figures["parts"])
    parts = f"Where the driver's CPU time goes (profile, cma_es, 200 dimensions): {listed}."
    return f"{_table(titles, rows)}\n\n{parts}"


def workers(figures: Figures) -> str:
    """How busy real workers are."""
    titles = ["Ray actors", "trials timed", "all there after, s", "workers busy", "driver works"]
    titles += ["ms a trial", "memory of an actor, MB", "load of the machine"]
    rows = [
        [
            f"{row['workers']}",
            f"{row['trials']}",
            f"{row['all_there_after']:.0f}",
            f"{row['busy']:.1%}",
            f"{row['driver']:.1%}",
            f"{row['milliseconds']:.1f}",
            f"{row['worker_mb']:.0f}",
            f"{row['load']:.0f}",
        ]
        for row in figures["rows"]
    ]
    return _table(titles, rows)


def cluster(figures: Figures) -> str:
    """How busy GPUs of simulated clusters are."""
    titles = ["GPUs", "trials", "busy, search", "busy, all"]
    titles += [f"idle, {phase}" for phase in figures["rows"][0]["ends"]]
    titles += ["driver works", "ms a trial", "driver full at"]
    rows = [
        [
            f"{row['gpus']:,}",
            f"{row['trials']:,}",
            f"{row['searching']:.2%}",
            f"{row['busy']:.1%}",
            *(f"{share:.1%}" for share in row["ends"].values()),
            f"{row['driver']:.2%}",
            f"{row['milliseconds']:.2f}",
            f"{row['saturated']:,} GPUs",
        ]
        for row in figures["rows"]
    ]
    waits = f"A sync of 3 kB to this disk takes {figures['sync_ms']:.1f} ms more, median of 50."
    return f"{_table(titles, rows)}\n\n{waits}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
