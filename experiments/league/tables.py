"""The league's tables: standings, cells, and what was run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from experiments.league.cells import SIZES
from experiments.league.contestants import Contestant
from experiments.league.ranking import (
    Scores,
    cell_means,
    critical_difference,
    friedman,
    ratios,
    standings,
)
from experiments.league.results import Result

#: A smaller gap, or a smaller share of missing volume, counts as this much.
FLOOR = 0.01
#: Captions.
TWINS = (
    "`auto` runs another contestant's code, its twin in a cell. A twin is no rival: ranks and "
    "nearness to the best are given with and without it."
)
FRONTS = (
    " Scored is what is recommended: the front by estimated losses for strategies of ours, the "
    "observed front for libraries. The last two columns score all alike, where that was measured."
)


def one_objective(result: Result) -> float:
    """The score of a match with one objective: the gap of what is recommended."""
    return max(result.gap, FLOOR)


def observed_front(result: Result) -> float:
    """The score of a match with several: 1 over the true hypervolume of the observed front."""
    return 1.0 / max(result.volume, FLOOR)


def estimated_front(result: Result) -> float:
    """The same of the front by estimates."""
    return 1.0 / max(result.estimated, FLOOR)


def recommended_front(libraries: set[str], result: Result) -> float:
    """The score of what is recommended: libraries recommend their observed front, we estimates."""
    library = result.contestant in libraries or not result.estimated
    return observed_front(result) if library else estimated_front(result)


def tables(results: Sequence[Result], players: Mapping[str, Contestant], size: str) -> str:
    """All tables as Markdown.

    Args:
        results: Of every match.
        players: All contestants.
        size: Of the league.
    """
    several = [result for result in results if result.volume > 0.0]
    one = [result for result in results if result.volume == 0.0]
    gradients = {name for name, player in players.items() if player.gradients}
    libraries = {name for name, player in players.items() if player.library}
    codes = _codes(players, size)
    parts = [_provenance(results, size)]
    for title, chosen, score in (
        ("One objective: gap of the recommended point", one, one_objective),
        (
            "Several objectives: true hypervolume of the recommended front",
            several,
            partial(recommended_front, libraries),
        ),
    ):
        fair = [result for result in chosen if result.contestant not in gradients]
        if len({result.contestant for result in fair}) > 1:
            parts.append(f"**{title}**")
            parts += _section(fair, score, codes, several=chosen is several)
    helped = [result for result in one if result.contestant in gradients]
    if helped:
        parts.append(
            "**One objective, with gradients of a smooth loss** (three evaluations a step)"
        )
        parts.append(_cells_table(_scores(helped, one_objective), helped, several=False))
    return "\n\n".join(parts)


def _codes(players: Mapping[str, Contestant], size: str) -> dict[tuple[str, str], str]:
    """What each contestant runs in each cell of a size."""
    cells = SIZES[size].cells
    return {
        (name, cell.name): who.code(cell.setup) for name, who in players.items() for cell in cells
    }


def _section(
    results: Sequence[Result],
    score: Callable[[Result], float],
    codes: Mapping[tuple[str, str], str],
    several: bool,
) -> list[str]:
    scores = _scores(results, score)
    return [
        TWINS + (FRONTS if several else ""),
        _standings_table(scores, results, codes, several),
        _test(scores),
        _cells_table(scores, results, several),
    ]


def _scores(results: Sequence[Result], score: Callable[[Result], float]) -> Scores:
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        found[result.contestant, result.cell].append(result)
    return {
        key: np.array([score(match) for match in sorted(matches, key=lambda m: m.seed)])
        for key, matches in found.items()
    }


def _provenance(results: Sequence[Result], size: str) -> str:
    commits = ", ".join(f"`{commit}`" for commit in sorted({r.commit for r in results}))
    seeds = len({result.seed for result in results})
    cells = len({result.cell for result in results})
    return (
        f"Size `{size}`: {len(results)} matches, {cells} cells, seeds: {seeds}; strategies of "
        f"commit {commits} (`+`: with changes that were not committed)."
    )


def _standings_table(
    scores: Scores,
    results: Sequence[Result],
    codes: Mapping[tuple[str, str], str],
    several: bool,
) -> str:
    more = " claimed / true volume | ratio, observed fronts | ratio, estimated fronts |"
    lines = [
        "| contestant | cells | mean rank | without its twin | ratio to the best (95 %) "
        "| worst ratio | within 10 % | without its twin | CPU per ask, ms |" + more * several,
        "|---|---|---|---|---|---|---|---|---|" + "---|---|---|" * several,
    ]
    fronts = _ratios_of_fronts(results) if several else {}
    for row in standings(scores, np.random.default_rng(0), codes):
        own = [result for result in results if result.contestant == row.name]
        mark = "*" if any(result.stopped for result in own) else ""
        claimed = np.mean([result.claimed / max(result.volume, FLOOR) for result in own])
        lines.append(
            f"| {row.name}{mark} | {row.cells} | {row.rank:.1f} | {row.rank_among_rivals:.1f} "
            f"| {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {row.worst:.2f} "
            f"| {row.near:.0%} | {row.near_rivals:.0%} "
            f"| {np.mean([result.cpu_ms for result in own]):.1f} |"
            + (f" {claimed:.2f} | {' | '.join(fronts[row.name])} |" if several else "")
        )
    return "\n".join(lines)


def _ratios_of_fronts(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Ratios where all are scored by observed fronts, and where all are by estimated ones."""
    measured = [result for result in results if result.estimated]
    found = [
        {row.name: f"{row.ratio:.2f}" for row in standings(scores, np.random.default_rng(0))}
        for scores in (_scores(results, observed_front), _scores(measured, estimated_front))
        if scores
    ]
    by_estimates = found[1] if measured else {}
    return {name: (ratio, by_estimates.get(name, "")) for name, ratio in found[0].items()}


def _test(scores: Scores) -> str:
    """Friedman's test and Nemenyi's difference, of those who played in all cells."""
    _, cells, means = cell_means(scores)
    whole = means[np.isfinite(means).all(axis=1)]
    if len(whole) < 3 or len(cells) < 3:
        return "Too few cells or contestants for a critical difference."
    return (
        f"Of {len(whole)} contestants that played in all {len(cells)} cells: critical difference "
        f"of mean ranks {critical_difference(len(whole), len(cells)):.1f} (Nemenyi, 5 %), Friedman "
        f"p = {friedman(whole):.1g}. A star marks what the CPU limit stopped."
    )


def _cells_table(scores: Scores, results: Sequence[Result], several: bool) -> str:
    names, cells, means = cell_means(scores)
    stopped = {(result.contestant, result.cell) for result in results if result.stopped}
    best = np.nanmin(means, axis=0)
    order = np.argsort(np.nanmean(np.log(ratios(means)), axis=1))
    label = "volume of the best" if several else "gap of the best"
    lines = [
        "| cell | " + " | ".join(names[row] for row in order) + f" | {label} |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for column, cell in enumerate(cells):
        shown = [
            _ratio(means[row, column], best[column], (names[row], cell) in stopped) for row in order
        ]
        value = 1.0 / best[column] if several else best[column]
        lines.append(f"| {cell} | " + " | ".join(shown) + f" | {value:.3f} |")
    return "\n".join(lines)


def _ratio(mean: float, best: float, stopped: bool) -> str:
    if not np.isfinite(mean):
        return ""
    text = f"{mean / best:.2f}"
    text = f"**{text}**" if mean == best else text
    return f"{text}*" if stopped else text


def finished(results: Iterable[Result], cells: set[str], seeds: int) -> list[Result]:
    """Results of the cells and seeds of a size, without cells that lack seeds."""
    wanted = [result for result in results if result.cell in cells and result.seed < seeds]
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for result in wanted:
        counts[result.contestant, result.cell] += 1
    return [r for r in wanted if counts[r.contestant, r.cell] == seeds]
