"""``make gpu-check``: all checks of this machine's card, and the report ``docs/gpu.md``.

Every check runs in a process of its own, so that a card which fails in one, or memory that one
keeps, does not reach the next. Exit codes: 0 if all bars are reached, 1 if one is missed, 2 if
there is no card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.gpu_check.check import TIERS, Check, Figure, Machine, Result, result_of
from experiments.gpu_check.report import PAGE, environment, page, verdict
from experiments.gpu_check.table import BY_NAME, checks_of
from mergesearch.merging.tensors.accelerator import accelerator

#: Seconds that all checks may take together, and those of a dry run's sizes.
BUDGET = 570.0
DRY_SCALE = 1e-4

NO_CARD = 2
MISSED = 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tier", choices=TIERS, default="full")
    parser.add_argument("--device", help="as torch names it; cpu is a dry run")
    parser.add_argument("--scale", type=float, help="of all sizes; 1 on a card, small elsewhere")
    parser.add_argument("--folder", type=Path, help="for models and arenas; 35 GB at scale 1")
    parser.add_argument("--out", type=Path, help="the report; docs/gpu.md for a CUDA card")
    parser.add_argument("--tests", default="tests", help="where tests marked gpu are looked for")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--check", choices=list(BY_NAME), action="append", help="these alone")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the checks; returns the exit code."""
    options = parse(arguments)
    device = options.device or accelerator()
    if device is None:
        print("gpu-check: expected a GPU that torch can use, found none; --device cpu is a dry run")
        return NO_CARD
    machine = Machine(
        device=device,
        folder=options.folder or Path(tempfile.gettempdir()),
        scale=options.scale or (1.0 if device == "cuda" else DRY_SCALE),
        threads=options.threads,
        tests=options.tests,
        seconds=options.budget,
    )
    if options.result is not None:
        return _run_one(BY_NAME[options.check[0]], machine, options.result)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.folder) as folder:
        results = run_all(chosen(options), replace(machine, folder=Path(folder)))
    _write(options, device, " ".join(arguments), results)
    missed = [result.name for result in results if result.passed is False]
    print(f"gpu-check: {'missed: ' + ', '.join(missed) if missed else 'all bars are reached'}")
    return MISSED if missed else 0


def chosen(options: argparse.Namespace) -> list[Check]:
    """The checks of the tier, or those that are asked for."""
    names = options.check or list(BY_NAME)
    return [check for check in checks_of(options.tier) if check.name in names]


def _run_one(check: Check, machine: Machine, out: Path) -> int:
    """The work of a process of its own."""
    import torch

    torch.set_num_threads(machine.threads)
    out.write_text(json.dumps(asdict(result_of(check, machine))))
    return 0


def run_all(checks: Sequence[Check], machine: Machine) -> list[Result]:
    """Run checks one after the other, and say what comes of each and how much time is left.

    Args:
        checks: In their order.
        machine: Whose ``seconds`` are for all of them; those for which nothing is left fail.
    """
    deadline = time.monotonic() + machine.seconds
    results = []
    for number, check in enumerate(checks, 1):
        left = deadline - time.monotonic()
        needed = sum(later.seconds for later in checks[number - 1 :])
        print(
            f"[{number}/{len(checks)}] {check.name}: {check.question} (about {needed:.0f} s to go, "
            f"{max(left, 0):.0f} s left)",
            flush=True,
        )
        if left <= 0:
            result = Result(check.name, False, reason=f"the {machine.seconds:.0f} s are over")
        else:
            result = in_own_process(check, replace(machine, seconds=left))
        show(result)
        results.append(result)
    return results


def in_own_process(check: Check, machine: Machine) -> Result:
    """The result of a check that runs in a process of its own; it fails if that dies."""
    out = machine.folder / "result.json"
    out.unlink(missing_ok=True)
    options: dict[str, Any] = {
        "check": check.name,
        "device": machine.device,
        "folder": machine.folder,
        "scale": machine.scale,
        "threads": machine.threads,
        "tests": machine.tests,
        "budget": machine.seconds,
        "result": out,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "experiments.gpu_check", *words]
    began = time.monotonic()
    quiet = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    try:
        # What libraries print there belongs to no report.
        done = subprocess.run(
            command, timeout=machine.seconds, stdout=subprocess.DEVNULL, env=quiet, check=False
        )
    except subprocess.TimeoutExpired:
        reason = f"was not done within {machine.seconds:.0f} s"
        return Result(check.name, False, reason=reason, seconds=time.monotonic() - began)
    if not out.exists():
        reason = f"its process ended with exit code {done.returncode}"
        return Result(check.name, False, reason=reason, seconds=time.monotonic() - began)
    return _from_json(json.loads(out.read_text()))


def _from_json(data: dict[str, Any]) -> Result:
    figures = tuple(Figure(**figure) for figure in data["figures"])
    return Result(**{**data, "figures": figures})


def show(result: Result) -> None:
    """Print what came of a check."""
    for figure in result.figures:
        bar = f" (bar {figure.bar})" if figure.bar else ""
        print(f"    {figure.what}: {figure.value}{bar} {verdict(figure).strip('*')}".rstrip())
    reason = f": {result.reason}" if result.reason else ""
    print(f"    {result.verdict} in {result.seconds:.0f} s{reason}", flush=True)
    if result.detail:
        print(result.detail, flush=True)


def _write(options: argparse.Namespace, device: str, words: str, results: Sequence[Result]) -> None:
    """Write the report: where it is asked for, or to the documents if it is of a real card."""
    out = options.out or (PAGE if device == "cuda" and options.check is None else None)
    if out is None:
        return
    date = datetime.now(UTC).date().isoformat()
    command = f"python -m experiments.gpu_check {words}".strip()
    out.write_text(page(environment(device, date, command), results))
    print(f"gpu-check: wrote {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
