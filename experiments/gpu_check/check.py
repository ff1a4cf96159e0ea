"""What a check is, what it finds, and the machine that it runs on."""

from __future__ import annotations

import importlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergesearch.merging.tensors.accelerator import device_module

#: ``kernels`` needs torch, triton, numba, numpy and transformers; ``full`` what `make install` has.
Tier = Literal["kernels", "full"]
TIERS: tuple[Tier, ...] = ("kernels", "full")

#: Widths of a Llama of 8 billion parameters, and what a scale below 1 leaves of them at least.
HIDDEN = 4096
LEAST_HIDDEN = 64


class Skipped(Exception):
    """A check cannot be done here; the message is the reason."""


@dataclass(frozen=True)
class Machine:
    """Where and how large checks run.

    Attributes:
        device: Type of the device as torch names it; ``cpu`` for a dry run.
        folder: For models and arenas; what one check writes there, later ones use.
        scale: Of the sizes: 1 on a card.
        threads: CPU threads.
        tests: What the tests marked ``gpu`` are collected from.
        kernel: Kernel of merges on the device.
        seconds: Time that a check may take.
    """

    device: str
    folder: Path
    scale: float = 1.0
    threads: int = 1
    tests: str = "tests"
    kernel: Literal["auto", "numba", "triton", "torch"] = "auto"
    seconds: float = 600.0

    @property
    def is_card(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device != "cpu"

    @property
    def judges_speed(self) -> bool:
        """Whether bars of speed hold: on real cards, and for sizes that fill them."""
        return self.device == "cuda" and self.scale >= 0.1

    @property
    def hidden(self) -> int:
        """Size of hidden states: that of an 8B model, or a smaller power of two."""
        wanted = HIDDEN * min(1.0, self.scale**0.5)
        return int(2 ** round(math.log2(max(LEAST_HIDDEN, wanted))))

    def memory(self) -> tuple[int, int] | None:
        """Free bytes of the card and all of them; None in main memory."""
        if not self.is_card:
            return None
        free, total = device_module(self.device).mem_get_info(0)
        return int(free), int(total)

    def at_most(self, size: float, share: float) -> int:
        """A size at full scale, scaled, and no more than a share of the card's free bytes."""
        memory = self.memory()
        scaled = int(size * self.scale)
        return scaled if memory is None else min(scaled, int(share * memory[0]))

    def synchronize(self) -> None:
        """Wait for the card."""
        if self.is_card:
            device_module(self.device).synchronize()

    def seconds_of(self, operation: Callable[[], Any]) -> float:
        """Wall seconds of an operation, until the card has done it."""
        self.synchronize()
        began = time.perf_counter()
        operation()
        self.synchronize()
        return time.perf_counter() - began


@dataclass(frozen=True)
class Figure:
    """One thing that a check measured.

    Attributes:
        what: In words.
        value: With its unit.
        bar: What it must reach, or empty.
        passed: Whether it does; None where nothing is judged.
    """

    what: str
    value: str
    bar: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Attributes:
        name: Of the check.
        passed: Whether no bar was missed and nothing went wrong; None where it was skipped.
        figures: What was measured.
        reason: Why it was skipped, or what went wrong.
        seconds: That it took.
        detail: The traceback of an error.
    """

    name: str
    passed: bool | None
    figures: tuple[Figure, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    detail: str = ""

    @property
    def verdict(self) -> str:
        """In one word."""
        return {True: "passed", False: "MISSED", None: "skipped"}[self.passed]


@dataclass(frozen=True)
class Check:
    """One question about the card.

    Attributes:
        name: On the command line and in the report.
        question: That it answers.
        tier: What has to be installed.
        seconds: That it takes on a card, about.
        module: Of this package; its ``run`` measures, or raises :class:`Skipped`. It is imported
            when the check runs, since what it needs may not be installed.
    """

    name: str
    question: str
    tier: Tier
    seconds: float
    module: str


def result_of(check: Check, machine: Machine) -> Result:
    """Run a check; an exception is a check that was not passed."""
    began = time.perf_counter()
    figures: tuple[Figure, ...] = ()
    passed: bool | None = None
    reason = ""
    detail = ""
    try:
        module = importlib.import_module(f"{__package__}.{check.module}")
        figures = tuple(module.run(machine))
        passed = all(figure.passed is not False for figure in figures)
    except Skipped as skipped:
        reason = str(skipped)
    except Exception as error:
        passed = False
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        detail = traceback.format_exc()
    return Result(check.name, passed, figures, reason, time.perf_counter() - began, detail)
