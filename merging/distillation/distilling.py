"""A distillation from paths to a folder: read, fuse, train, write."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.distillation.reading import Reader, open_reader
from mergesearch.merging.distillation.settings import Settings
from mergesearch.merging.distillation.targets import Targets, make_targets
from mergesearch.merging.distillation.training import (
    Example,
    Report,
    held_out_losses,
    train_lora,
)
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.companions import copy_companions
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import path_shown

#: What the record of a distillation is called, beside the weights.
RECORD = "distillation.json"
#: What the fingerprint of a training that waits is called.
WAITING = "asked.json"


@dataclass(frozen=True)
class Distilled:
    """A distilled model.

    Attributes:
        folder: The model, or the adapter.
        texts: Texts that were trained on.
        covered: Of each source, the part of the pivot's tokens that it said something about.
        weights: Mean weight of pivot and sources.
        before, after: Mean loss on held-out texts, in nats per token; None without any.
        gain: Mean of the differences of these, text by text, and half its 95 % interval.
    """

    folder: Path
    texts: int
    covered: tuple[float, ...]
    weights: tuple[float, ...]
    before: float | None
    after: float | None
    gain: tuple[float, float] | None


def distill(
    pivot: str,
    sources: Sequence[str],
    texts: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    adapter: bool = False,
    overwrite: bool = False,
    report: Report = lambda step, steps, loss, left: None,
) -> Distilled:
    """Write a model in the pivot's shape that has learnt from sources of any shape.

    What a stopped run had trained is kept beside ``out`` and used if the same is asked again.

    Args:
        pivot: The model that is trained.
        sources: Models that it learns from.
        texts: What they are read on.
        out: Folder to create; may exist if it is empty.
        settings: Of the distillation.
        adapter: Write the LoRA alone.
        overwrite: Replace a folder that is not empty.
        report: Is told of the progress.

    Raises:
        InputError: In one line, before weights are read.
        CheckpointError: If a model cannot be opened.
    """
    check_libraries()
    if not sources:
        raise InputError("sources: expected at least one model, received none; name one")
    readers = [open_reader(path, settings.length) for path in (pivot, *sources)]
    target = resolved(out)
    check_target(target, [reader.checkpoint for reader in readers], overwrite)
    kept, held = divided(texts, settings)
    work = target.with_name(f".{target.name}.distilling")
    _prepare(work, _fingerprint(readers, texts, settings))
    targets = make_targets(readers[0], readers[1:], kept, settings)
    model, losses = _trained(readers[0], targets, held, settings, work, report)
    result = _result(target, targets, losses)
    _write(model, readers, target, settings, result, adapter=adapter)
    shutil.rmtree(work, ignore_errors=True)
    return result


def check_libraries() -> None:
    """Refuse to begin without the libraries of the extra.

    Raises:
        InputError: With the one that lacks.
    """
    for name in ("peft", "rapidfuzz"):
        if find_spec(name) is None:
            raise InputError(
                f"distill: expected the package {name}, found none; "
                "`pip install 'mergesearch[distill]'`"
            )


def divided(texts: Sequence[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Texts that are trained on, and those that are held out; empty ones are left out.

    Raises:
        InputError: If fewer than a batch is left.
    """
    used = [text for text in texts if text.strip()]
    order = np.random.default_rng([settings.seed, 21]).permutation(len(used)).tolist()
    count = round(settings.held_out * len(used))
    held = {*order[:count]}
    if len(used) - count < settings.batch:
        raise InputError(
            f"data: expected at least {settings.batch + count} texts that are not empty, received "
            f"{len(used)}; give more, or a smaller batch"
        )
    kept = [text for index, text in enumerate(used) if index not in held]
    return kept, [text for index, text in enumerate(used) if index in held]


def _trained(
    pivot: Reader,
    targets: Targets,
    held: Sequence[str],
    settings: Settings,
    work: Path,
    report: Report,
) -> tuple[Any, tuple[list[float], list[float]]]:
    """The pivot with its LoRA, and losses of held-out texts before and after."""
    import torch

    from mergesearch.merging.distillation.reading import tokenized
    from mergesearch.merging.models.loading import load_model

    examples = [
        Example(text, fused)
        for text, fused in zip(targets.texts, targets.fused, strict=True)
        if len(text.ids)
    ]
    measured = [text for text in tokenized(pivot, held) if len(text.ids)]
    model: Any = load_model(pivot.path, "AutoModelForCausalLM")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = held_out_losses(model, pivot.first, measured)
    trained = train_lora(model, pivot.first, examples, settings, work, report)
    return trained, (before, held_out_losses(trained, pivot.first, measured))


def _result(target: Path, targets: Targets, losses: tuple[list[float], list[float]]) -> Distilled:
    before, after = (np.array(one) for one in losses)
    weights = tuple(float(one) for one in targets.weights.mean(axis=0))
    plain = Distilled(target, len(targets.texts), targets.covered, weights, None, None, None)
    if not len(before):
        return plain
    gains = before - after
    half = 1.96 * float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return replace(
        plain,
        before=float(before.mean()),
        after=float(after.mean()),
        gain=(float(gains.mean()), half),
    )


def _fingerprint(readers: Sequence[Reader], texts: Sequence[str], settings: Settings) -> str:
    """What a training follows from: models by path and content's size, texts, settings."""
    models = [
        [reader.path, sorted((name, str(info)) for name, info in reader.checkpoint.tensors.items())]
        for reader in readers
    ]
    asked = json.dumps([models, list(texts), asdict(settings)])
    return hashlib.sha256(asked.encode()).hexdigest()


def _prepare(work: Path, asked: str) -> None:
    """Make the folder of the training, or keep it if the same was asked before.

    Raises:
        InputError: If it cannot be made.
    """
    try:
        mark = work / WAITING
        if not mark.is_file() or mark.read_text() != asked:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_atomically(mark, asked)
    except OSError as error:
        raise InputError(
            f"{path_shown(work)}: expected a place to write to, received: "
            f"{error.strerror or error}; choose another --out"
        ) from error


def _write(
    model: Any,
    readers: Sequence[Reader],
    target: Path,
    settings: Settings,
    result: Distilled,
    *,
    adapter: bool,
) -> None:
    """Write the folder beside its place, and move it there when it is complete.

    Raises:
        InputError: If there is no room.
    """
    from mergesearch.merging.models.loading import no_progress_bar

    folder = Path(str(readers[0].checkpoint.folder))
    try:
        with new_folder(target) as part:
            if adapter:
                model.peft_config["default"].base_model_name_or_path = readers[0].path
                model.save_pretrained(str(part))
            else:
                with no_progress_bar():
                    model.merge_and_unload().save_pretrained(str(part))
                copy_companions(
                    folder, part, lambda file: (part / file.relative_to(folder)).exists()
                )
            record = {
                "pivot": readers[0].path,
                "sources": [reader.path for reader in readers[1:]],
                "settings": asdict(settings),
                **{key: value for key, value in asdict(result).items() if key != "folder"},
            }
            write_atomically(part / RECORD, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"{path_shown(target)}: expected a place to write to, received: "
            f"{error.strerror or error}"
        ) from error
