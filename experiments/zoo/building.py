"""Builds zoos: whole or not at all, on one thread, reused where the settings are the same.

Their command lines are alike too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance


def build_beside(
    out: Path, kind: str, complete: Callable[[], bool], write: Callable[[Path], None]
) -> None:
    """Make a zoo in ``out`` unless it is complete there.

    It is written beside ``out`` and renamed when complete, so a killed build leaves nothing
    half-made there.

    Args:
        out: Folder to make.
        kind: What the zoo is called, for messages.
        complete: Whether ``out`` holds the zoo that is wanted.
        write: Writes it into a folder, the manifest last.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    if complete():
        return
    if out.exists() and not (out / "manifest.json").is_file():
        raise InputError(
            f"--out: expected a new folder or a {kind} zoo, received {out}; choose another"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "zoo"
        with one_thread():
            write(fresh)
        if not complete():  # another process may have been faster
            if out.exists():
                out.rename(Path(scratch) / "old")
            fresh.rename(out)


def holds(out: Path, number: int, settings: DataclassInstance) -> bool:
    """Whether the manifest in ``out`` is that of a format's number and settings."""
    path = out / "manifest.json"
    if not path.is_file():
        return False
    manifest = json.loads(path.read_text())
    return bool(manifest.get("format") == number and manifest.get("settings") == asdict(settings))


def write_manifest(
    folder: Path, number: int, settings: DataclassInstance, started: float, **facts: Any
) -> None:
    """Write the manifest that :func:`holds` looks for, last of all files of a zoo.

    Args:
        folder: Of the zoo.
        number: Of its format.
        settings: That it was made with.
        started: ``time.perf_counter()`` when its making began.
        **facts: What else it says, such as measured accuracies.
    """
    seconds = round(time.perf_counter() - started, 1)
    manifest = {"format": number, "settings": asdict(settings), **facts, "seconds": seconds}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def task_arithmetic(
    weights: Mapping[str, Mapping[str, torch.Tensor]], coefficient: float
) -> dict[str, torch.Tensor]:
    """Base plus the scaled sum of the others' task vectors.

    Ilharco 2023, "Editing Models with Task Arithmetic".

    Args:
        weights: ``base`` and experts -> state dict.
        coefficient: Of the sum.
    """
    base, *experts = (weights[name] for name in ("base", *(n for n in weights if n != "base")))
    return {
        key: value + coefficient * sum((one[key] - value for one in experts), start=0 * value)
        if value.is_floating_point()
        else value
        for key, value in base.items()
    }


def scores_along(
    models: Mapping[str, Any], line: Sequence[float], score: Callable[[Any], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Scores of base and experts, and of task arithmetic with some coefficients.

    Args:
        models: ``base``, whose weights are overwritten, and experts.
        line: The coefficients.
        score: Scores a model.
    """
    rows = {name: score(model) for name, model in models.items()}
    weights = copied_weights(models)
    for coefficient in line:
        models["base"].load_state_dict(task_arithmetic(weights, coefficient))
        rows[f"coefficient {coefficient:.2f}"] = score(models["base"])
    return rows


def copied_weights(models: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the weights of models as they are now."""
    return {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in models.items()
    }


@dataclass(frozen=True)
class Maker:
    """What the command line of a zoo makes.

    Attributes:
        name: Of its folder below ``zoo``.
        what: What is made, as a sentence.
        scores: What ``--measure`` prints, in a table.
        experts: Number of experts.
        settings: Seed -> settings of the zoo.
        complete: Whether a folder holds the zoo of settings.
        build: Makes the zoo of settings in a folder, or reuses it.
        measure: The rows of the table for a zoo of settings in a folder: name -> column -> score.
        title: What the table shows.
        width: Of its columns.
    """

    name: str
    what: str
    scores: str
    experts: int
    settings: Callable[[int], Any]
    complete: Callable[[Path, Any], bool]
    build: Callable[[Path, Any], Path]
    measure: Callable[[Path, Any], Mapping[str, Mapping[str, float]]]
    title: str
    width: int = 10


def make_zoo(maker: Maker, arguments: Sequence[str] | None) -> None:
    """Run the command line of a zoo."""
    parser = argparse.ArgumentParser(description=maker.what)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("zoo", maker.name),
        help="folder to make (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"also print {maker.scores}, and the task-arithmetic line",
    )
    options = parser.parse_args(arguments)
    silence_transformers()
    settings = maker.settings(options.seed)
    reused = maker.complete(options.out, settings)
    try:
        folder = maker.build(options.out, settings)
    except InputError as error:
        parser.error(str(error))
    seconds = json.loads((folder / "manifest.json").read_text())["seconds"]
    made = f"base, {maker.experts} experts, data; {seconds} s"
    print(f"{folder}: {'already there, reused' if reused else made}")
    if options.measure:
        _print_table(maker, maker.measure(folder, settings))


def _print_table(maker: Maker, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print the rows in percent, and the mean of each."""
    columns = [*next(iter(rows.values())), "mean"]
    print(f"{maker.title:<18}" + "".join(f"{column:>{maker.width}}" for column in columns))
    for name, row in rows.items():
        figures = [*row.values(), float(np.mean(list(row.values())))]
        print(f"{name:<18}" + "".join(f"{100 * figure:>{maker.width}.1f}" for figure in figures))


def silence_transformers() -> None:
    """No progress bars for the saving and loading of small models."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, so that weights do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
