"""The report of the checks, ``docs/gpu.md``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.gpu_check.check import Figure, Result
from experiments.gpu_check.table import BY_NAME, CHECKS
from mergesearch.search.workers.devices import current_device

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"

PACKAGES = ("torch", "triton", "numba", "transformers")

_HEAD = """# On a GPU

`make gpu-check` proves on a card what the tests prove without one, in less than ten minutes, and
writes this page. On a machine where only torch, triton, numba, numpy and transformers are
installed, `make gpu-check TIER=kernels` does the part that needs no more. Models and arenas take
35 GB of the temporary folder, less where the card or the disk is small.

The program behind it, `python -m experiments.gpu_check`, exits with 1 if a bar is missed, and with
2 if there is no card. `--help` lists its options; `--device cpu` is a dry run without a card, which
judges bits and not speed.
"""

_BLANK = """
**No card was at hand when this page was written, so it has no figures yet.** Kernels, planner,
recovery and sharding are tested without one: by Triton's interpreter and compiler, and on a pretend
card ([tests](../tests/README.md#the-pretend-card)). What these cannot show is speed, the memory
that CUDA really takes, and handles between processes. Where a card can be had, run
`make gpu-check` and commit this page.
"""


@dataclass(frozen=True)
class Environment:
    """What a report was made on.

    Attributes:
        device: Card and driver, in words.
        cards: Number of cards.
        packages: Name -> version.
        date: In ISO format, UTC.
        command: That was run.
    """

    device: str
    cards: int
    packages: Mapping[str, str]
    date: str
    command: str


def environment(device: str, date: str, command: str) -> Environment:
    """The device of this machine and the packages that are installed."""
    found = current_device(kind=device)
    packages = {name: _version(name) for name in PACKAGES}
    return Environment(f"{found}", found.count or 0, packages, date, command)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def blank() -> str:
    """The page before any card was at hand."""
    return "\n".join([_HEAD + _BLANK, *_questions()]) + "\n"


def _questions() -> Iterator[str]:
    yield "| check | what it answers |"
    yield "|---|---|"
    for check in CHECKS:
        yield f"| {check.name} | {check.question} |"


def page(found: Environment, results: Sequence[Result]) -> str:
    """The page with figures."""
    packages = ", ".join(f"{name} {number}" for name, number in found.packages.items())
    seconds = sum(result.seconds for result in results)
    lines = [
        _HEAD,
        _made_with(found, packages, seconds),
        "",
        "| check | what was measured | value | bar | |",
        "|---|---|---|---|---|",
        *[line for result in results for line in _rows(result)],
        *_not_run({result.name for result in results}),
        "",
        "Figures without a bar, or with an empty verdict, are not judged. The questions:",
        "",
        *_questions(),
    ]
    return "\n".join(lines) + "\n"


def _not_run(done: Collection[str]) -> Iterator[str]:
    """Rows of checks that were not asked for, or that the tier does not have."""
    for check in CHECKS:
        if check.name not in done:
            yield f"| {check.name} | {check.question} | not run | | |"


def _made_with(found: Environment, packages: str, seconds: float) -> str:
    return (
        f"**{found.device}**, {found.cards} in the machine; {packages}; {found.date}; "
        f"`{found.command}`, {seconds:.0f} seconds."
    )


def _rows(result: Result) -> Iterator[str]:
    for figure in result.figures:
        cells = (result.name, figure.what, figure.value, figure.bar, verdict(figure))
        yield f"| {' | '.join(map(_cell, cells))} |"
    if result.reason:
        reason = f"{result.verdict}: {result.reason}"
        yield f"| {result.name} | {_cell(BY_NAME[result.name].question)} | {_cell(reason)} | | |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def verdict(figure: Figure) -> str:
    """Whether a figure reaches its bar, in one word; empty where nothing is judged."""
    return {True: "passed", False: "**MISSED**", None: ""}[figure.passed]
