"""Experiment 2: do competition, attraction and split points pay in M2N2?

Two halves of a digit classifier are merged in four ways.

``python -m experiments.e0002_m2n2`` trains the parents, runs every variant from the same ones, and
prints the table of ``experiments/0002-m2n2/README.md``; with ``--write`` it writes the table there.

The task is the one of the method's authors: the 1,797 scans of scikit-learn in order, the first
80 % for training, a perceptron 64-256-10, one parent that has seen the digits 0 to 4, one that has
seen 5 to 9. The base is zero, so that a merge is a weighted sum of the parents. The strategy is the
product's, through ask and tell; so is the merge.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout, Recipe, Source
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.resident.segment_gram import SegmentGram
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.m2n2 import M2n2
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.spaces import SegmentSpace, arc_bounds, segment_space

README = Path(__file__).parent / "0002-m2n2" / "README.md"

#: Variant -> options of the strategy.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "M2N2": {},
    "without attraction": {"attraction": False},
    "without split point": {"split": False},
    "plain GA (no competition, no attraction)": {"alpha": 0.0, "attraction": False},
}

#: The parents: steps of Adam on all their images, and its rate.
STEPS = 10
RATE = 3e-3

PIXELS = 64
HIDDEN = 256
CLASSES = 10
SEGMENTS = 64

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels ``(n, 64)``, their digits ``(n,)``, and scratch for the hidden layer ``(n, 256)``."""

    pixels: Floats
    digits: npt.NDArray[np.int64]
    hidden: Floats = field(repr=False)

    @classmethod
    def of(cls, pixels: npt.NDArray[Any], digits: npt.NDArray[Any]) -> Images:
        """Images from pixels and digits of any dtype."""
        return cls(
            pixels.astype(np.float32),
            digits.astype(np.int64),
            np.empty((len(digits), HIDDEN), np.float32),
        )


@dataclass(frozen=True, eq=False)
class Task:
    """What is merged and scored for one seed.

    Attributes:
        layout: Flat index of the four tensors.
        rows: The parents over the flat index ``(2, size)``.
        train, test: Images.
        merged: Where merges are written ``(size,)``.
    """

    layout: Layout
    rows: Floats
    train: Images
    test: Images
    merged: Floats

    def scores(self, one: Field, images: Images) -> npt.NDArray[np.float64]:
        """1 for each image that the merge gets right, else 0 ``(n,)``."""
        combine(np.zeros_like(self.merged), self.rows, one, "delta", self.merged)
        bias, weight, last_bias, last_weight = (
            self.merged[spec.start : spec.stop].reshape(spec.shape) for spec in self.layout.tensors
        )
        np.matmul(images.pixels, weight.T, out=images.hidden)
        np.add(images.hidden, bias, out=images.hidden)
        np.maximum(images.hidden, 0, out=images.hidden)
        logits = images.hidden @ last_weight.T + last_bias
        return np.asarray(logits.argmax(axis=1) == images.digits, np.float64)


@dataclass(frozen=True)
class Result:
    """Accuracy of the chosen merge of one run, in percent."""

    seed: int
    variant: str
    train: float
    test: float
    segments: int
    seconds: float


@cache
def load_images() -> tuple[Images, Images]:
    """The first 80 % and the rest, in the order in which scikit-learn has them."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    cut = int(0.8 * len(scans.data))
    return Images.of(scans.data[:cut], scans.target[:cut]), Images.of(
        scans.data[cut:], scans.target[cut:]
    )


def make_task(seed: int) -> Task:
    """Two parents with starting weights of their own, trained on one half of the digits each."""
    train, test = load_images()
    shapes = {"hidden.bias": (HIDDEN,), "hidden.weight": (HIDDEN, PIXELS)}
    shapes |= {"output.bias": (CLASSES,), "output.weight": (CLASSES, HIDDEN)}
    layout = Layout.build({name: (shape, "float32") for name, shape in shapes.items()})
    rows = np.zeros((2, layout.size), np.float32)
    for parent, row in enumerate(rows):
        mine = (train.digits >= 5) == bool(parent)
        trained = train_parent(
            layout, train.pixels[mine], train.digits[mine], np.random.default_rng([seed, parent])
        )
        for name, tensor in trained.items():
            spec = layout.by_name[name]
            row[spec.start : spec.stop] = tensor.ravel()
    return Task(layout, rows, train, test, np.zeros(layout.size, np.float32))


def train_parent(
    layout: Layout, pixels: Floats, digits: npt.NDArray[np.int64], rng: np.random.Generator
) -> dict[str, Floats]:
    """Tensors by name after a few steps on all images, from the weights of a new ``Linear``."""
    import torch
    from torch.nn import functional

    inputs = {"hidden": PIXELS, "output": HIDDEN}
    tensors = {}
    for spec in layout.tensors:
        bound = inputs[spec.name.split(".")[0]] ** -0.5
        tensors[spec.name] = torch.from_numpy(
            rng.uniform(-bound, bound, spec.shape).astype(np.float32)
        ).requires_grad_()
    optimizer = torch.optim.Adam(tensors.values(), lr=RATE)
    for _ in range(STEPS):
        hidden = functional.linear(
            torch.from_numpy(pixels), tensors["hidden.weight"], tensors["hidden.bias"]
        ).relu()
        logits = functional.linear(hidden, tensors["output.weight"], tensors["output.bias"])
        loss = functional.cross_entropy(logits, torch.from_numpy(digits))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def make_space(task: Task) -> SegmentSpace:
    """Fields of up to 64 segments over both parents."""
    size = task.layout.size
    sources = (Source("0 to 4", "0-4"), Source("5 to 9", "5-9"))
    template = Recipe(
        Source("zero", "zero"), sources, "task_arithmetic", Field.constant(size, [0.0, 0.0])
    )
    low, high = arc_bounds(0.0, 1.0)
    gram = SegmentGram.of_arrays(np.zeros(size, np.float32), task.rows).gram
    return segment_space(
        template, task.layout, segments=SEGMENTS, low=low, high=high, start=0.5, gram=gram
    )


def make_problem(task: Task, space: SegmentSpace, evaluations: int) -> Problem:
    """The strategy's problem: accuracy on the training images, with the parents as anchors."""
    parents = [space.encode(Field.constant(space.layout.size, row)) for row in np.eye(2)]
    anchors = tuple(measure(task, space, point) for point in parents if point is not None)
    return Problem(
        space.lower,
        space.upper,
        anchors[0].point,
        objectives=1,
        budget=evaluations,
        scale=np.array([[-1.0, 0.0]]),
        weights=np.ones(1),
        anchors=anchors,
        signs=-np.ones(1),
        names=("accuracy",),
        items=len(task.train.digits),
        space=space,
    )


def measure(task: Task, space: SegmentSpace, point: Point, id: int | None = None) -> TrialResult:
    """The result of a trial on the training images."""
    scores = task.scores(space.field(point), task.train)
    return TrialResult(id, point, np.array([-scores.mean()]), {"accuracy": scores})


def run_variant(seed: int, variant: str, evaluations: int) -> Result:
    """One search; its answer is the member of the archive with the best mean training score."""
    began = time.perf_counter()
    task = make_task(seed)
    space = make_space(task)
    problem = make_problem(task, space, evaluations)
    strategy = build_strategy("m2n2", check_options("m2n2", VARIANTS[variant]), problem, seed)
    assert isinstance(strategy, M2n2)
    for _ in range(evaluations):
        suggestion = strategy.ask(1)[0]
        strategy.tell([measure(task, space, suggestion.point, suggestion.id)])
    means = strategy.archive.scores.mean(axis=1)
    answer = strategy.archive.fields[int(means.argmax())]
    test = 100 * float(task.scores(answer, task.test).mean())
    return Result(
        seed, variant, 100 * float(means.max()), test, answer.segments, time.perf_counter() - began
    )


def run_known(seed: int) -> list[Result]:
    """The better parent and their average, which need no search."""
    task = make_task(seed)
    fields = [Field.constant(task.layout.size, c) for c in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])]
    scored = [
        [100 * float(task.scores(one, images).mean()) for images in (task.train, task.test)]
        for one in fields
    ]
    better = max(scored[:2])
    named = {"better parent": better, "average of the parents": scored[2]}
    return [Result(seed, name, train, test, 1, 0.0) for name, (train, test) in named.items()]


def run_all(seeds: int, evaluations: int, processes: int) -> list[Result]:
    """Every variant from every seed, one search in each process at a time."""
    tasks = [(seed, variant, evaluations) for seed in range(seeds) for variant in VARIANTS]
    known = list(itertools.chain.from_iterable(run_known(seed) for seed in range(seeds)))
    # Read when a process starts.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    searched = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for result in pool.imap_unordered(_run, tasks):
            searched.append(result)
            each = 1e3 * result.seconds / evaluations
            print(
                f"{len(searched)}/{len(tasks)} {result} {each:.2f} ms each",
                file=sys.stderr,
                flush=True,
            )
    return [*known, *searched]


def _run(task: tuple[int, str, int]) -> Result:
    return run_variant(*task)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t)."""
    from scipy import stats

    array = np.array(values)
    error = array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean()), float(stats.t.ppf(0.975, array.size - 1) * error)


def differences(results: Sequence[Result], one: str, other: str) -> list[float]:
    """Test accuracy of one variant minus that of another from the same parents, for each seed."""
    test = {(result.seed, result.variant): result.test for result in results}
    return [
        test[seed, one] - test[seed, other] for seed in sorted({result.seed for result in results})
    ]


def render(results: Sequence[Result], evaluations: int) -> str:
    """The tables and the answers in Markdown."""
    return "\n".join(_lines(results, evaluations))


def _lines(results: Sequence[Result], evaluations: int) -> Iterator[str]:
    names = list(dict.fromkeys(result.variant for result in results if result.seconds == 0))
    seeds = sorted({result.seed for result in results})
    pairs = f"{len(seeds)} pairs of parents, {evaluations:,} evaluations per search"
    yield f"{pairs}; accuracy in %, mean ± 95 % interval."
    yield ""
    yield "| merge | test | training | lowest and highest test |"
    yield "|---|---|---|---|"
    means = {}
    for name in (*names, *VARIANTS):
        test, train = (
            [getattr(r, split) for r in results if r.variant == name] for split in ("test", "train")
        )
        (means[name], width) = interval(test)
        (train_mean, train_width) = interval(train)
        cells = f"{means[name]:.1f} ± {width:.1f} | {train_mean:.1f} ± {train_width:.1f}"
        yield f"| {name} | {cells} | {min(test):.1f} to {max(test):.1f} |"
    yield ""
    yield "| difference from the same parents | test, points | seeds in favour |"
    yield "|---|---|---|"
    full, without, unsplit, plain = VARIANTS
    for label, one, other in (
        ("attraction: M2N2 minus without it", full, without),
        ("split point: M2N2 minus without it", full, unsplit),
        ("competition: without attraction minus plain GA", without, plain),
        ("no split point minus plain GA", unsplit, plain),
    ):
        points = differences(results, one, other)
        mean, width = interval(points)
        better = f"{sum(point > 0 for point in points)} of {len(points)}"
        yield f"| {label} | {mean:+.1f} ± {width:.1f} | {better} |"
    yield ""
    holds = means[full] > means[unsplit] > means[plain]
    answer = "holds" if holds else "does not hold"
    yield f"M2N2 > no split point > plain GA on the means: **{answer}**."


def write_table(text: str, path: Path = README) -> None:
    """Replace what stands between the markers of the README."""
    pattern = r"(<!-- table: begin -->\n).*(\n<!-- table: end -->)"
    new, count = re.subn(
        pattern, lambda m: m[1] + text + m[2], path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{path}: expected one pair of table markers, found {count}")
    path.write_text(new, encoding="utf-8")


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="pairs of parents (at least 2)")
    parser.add_argument(
        "--evaluations", type=int, default=10_000, help="merges that each search scores"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="searches at a time, one thread each"
    )
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    options = parser.parse_args()
    text = render(
        run_all(options.seeds, options.evaluations, options.processes), options.evaluations
    )
    print(text)
    if options.write:
        write_table(text)


if __name__ == "__main__":
    main()
