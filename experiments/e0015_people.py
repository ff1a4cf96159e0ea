"""What a few choices of a person tell of each trial (experiment 15)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.running import ROOT, mean_and_half, write_between
from mergesearch.evaluators.preference.pairing import plan_slots, strongest
from mergesearch.evaluators.preference.strengths import Comparison, Strength, fit_strengths

README = ROOT / "experiments" / "0015-people" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"
#: True strengths are normal with this mean and deviation; the base has 0.
MEAN = 0.5
SPREAD = 1.0
#: Davidson's parameter of ties: about one choice in four between equal models.
TIE = -0.5


@dataclass(frozen=True)
class Setting:
    """How trials are judged: choices for each, and whom they meet."""

    title: str
    choices: int
    rivals: int


SETTINGS = (
    Setting("4 choices", 4, 2),
    Setting("8 choices", 8, 2),
    Setting("8 choices, against the base alone", 8, 0),
    Setting("16 choices", 16, 2),
    Setting("16 choices, against the base alone", 16, 0),
)


@dataclass(frozen=True)
class Judged:
    """One study: true strengths, those that were told, and those of the last fit ``(trials,)``."""

    truth: np.ndarray
    told: np.ndarray
    errors: np.ndarray
    final: np.ndarray


def judged_study(setting: Setting, trials: int, seed: int) -> Judged:
    """Trials of random strength, judged one after the other by a person who follows the model."""
    rng = np.random.default_rng([15, seed])
    truth = {"base": 0.0} | {f"m{n}": float(rng.normal(MEAN, SPREAD)) for n in range(trials)}
    prompts = [f"p{number}" for number in range(setting.choices)]
    order = ["base"]
    comparisons: list[Comparison] = []
    told: list[Strength] = []
    fitted: dict[str, Strength] = {}
    for name in list(truth)[1:]:
        rivals = strongest(order, fitted, "base", setting.rivals)
        for slot in plan_slots(prompts, "base", rivals, setting.choices):
            comparisons.append(_choice(name, slot.opponent, truth, rng))
        order.append(name)
        fitted = fit_strengths(comparisons, "base").of
        told.append(fitted[name])
    names = order[1:]
    return Judged(
        np.array([truth[name] for name in names]),
        np.array([strength.value for strength in told]),
        np.array([strength.error for strength in told]),
        np.array([fitted[name].value for name in names]),
    )


def _choice(one: str, other: str, truth: dict[str, float], rng: np.random.Generator) -> Comparison:
    chances = np.exp([truth[one], truth[other], TIE + (truth[one] + truth[other]) / 2])
    outcome = int(rng.choice(3, p=chances / chances.sum()))
    return Comparison(one, other, (one, other, None)[outcome])


def row(setting: Setting, studies: Sequence[Judged]) -> str:
    """A row of the table."""
    told = np.concatenate([study.told for study in studies])
    final = np.concatenate([study.final for study in studies])
    truth = np.concatenate([study.truth for study in studies])
    errors = np.concatenate([study.errors for study in studies])
    correlations = [float(np.corrcoef(s.truth, s.told)[0, 1]) for s in studies]
    lost = [float(s.truth.max() - s.truth[s.told.argmax()]) for s in studies]
    lost_last = [float(s.truth.max() - s.truth[s.final.argmax()]) for s in studies]
    cells = [
        setting.title,
        ", ".join(f"{np.quantile(errors, share):.2f}" for share in (0.05, 0.5, 0.95)),
        f"{100 * np.mean(np.abs(told - truth) < 2 * errors):.0f}",
        f"{100 * np.mean(np.abs(told - final) < errors):.0f}",
        mean_and_half(correlations, 2),
        mean_and_half(lost, 2),
        mean_and_half(lost_last, 2),
    ]
    return f"| {' | '.join(cells)} |"


def table(studies: int, trials: int) -> str:
    """The table of all settings."""
    head = (
        "| trials are judged by | standard error (5 %, median, 95 %) | truth within 2 of them, % | "
        "last fit within 1, % | correlation with the truth | lost by the best told value | "
        "lost by the best of the last fit |\n|---|---|---|---|---|---|---|"
    )
    rows = [
        row(setting, [judged_study(setting, trials, seed) for seed in range(studies)])
        for setting in SETTINGS
    ]
    return "\n".join([head, *rows])


def main(readme: Path = README) -> None:
    """Simulate, and write the table."""
    parser = argparse.ArgumentParser(description="Simulate people who judge the trials of studies.")
    parser.add_argument(
        "--studies", type=int, default=20, help="of each kind (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=30, help="of a study (default: %(default)s)")
    options = parser.parse_args()
    text = table(options.studies, options.trials)
    write_between(readme, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
