"""Rebuilds a merge from its recipe, and says whether it is what was recorded."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.content import Content
from mergesearch.merging.export.difference import Difference, difference
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.mixture.exporting import export_mixture
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.plan import Plan
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.replay.scores import (
    ReplayedScores,
    check_head,
    score_by_run,
    score_by_study,
    study_plan,
    trial_of,
)
from mergesearch.search.runs.replay.sources import ReplaySource

#: Digits of a fingerprint that people are shown.
SHOWN = 16


@dataclass(frozen=True)
class Replayed:
    """A rebuilt merge beside what was recorded.

    Attributes:
        source: What it was rebuilt from.
        weights: Fingerprint of the rebuilt weights.
        recorded: Fingerprint that the export recorded; None where none is recorded.
        difference: From the weights that the export wrote; None where they are not there.
        scores: Of the rebuilt merge; None where it was not scored.
        seconds: How long rebuilding took.
    """

    source: ReplaySource
    weights: str
    recorded: str | None
    difference: Difference | None
    scores: ReplayedScores | None
    seconds: float

    @property
    def identical(self) -> bool | None:
        """Whether the weights are those of the export; None where nothing is known of these."""
        known = [] if self.recorded is None else [self.recorded == self.weights]
        known += [] if self.difference is None else [self.difference.none]
        return all(known) if known else None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs that could be compared."""
        agreement = None if self.scores is None else self.scores.agreement
        return self.identical is not False and (agreement is None or agreement.agrees)

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": str(self.source.path),
            "recipe": self.source.recipe.digest,
            "weights": self.weights,
            "recorded": self.recorded,
            "identical": self.identical,
            "difference": None if self.difference is None else self.difference.to_dict(),
            "scores": None if self.scores is None else self.scores.to_dict(),
            "agrees": self.agrees,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """For people."""
        rebuilt = f"rebuilt in {self.seconds:.1f} s, weights {self.weights[:SHOWN]}"
        lines = [f"{rebuilt}: {self._verdict()}"]
        lines += [] if self.difference is None else self.difference.lines()
        return lines + ([] if self.scores is None else [self.scores.line()])

    def _verdict(self) -> str:
        if self.identical is None:
            return "no weights are recorded to compare them with"
        if self.identical:
            return "identical to the export"
        if self.recorded in (None, self.weights):
            return "DIFFERENT from the weights in the folder" + (
                "" if self.recorded is None else ", which are not those that the export recorded"
            )
        return f"DIFFERENT from those that the export recorded ({self.recorded[:SHOWN]})"


def replay(source: ReplaySource, study: Path | None = None, out: Path | None = None) -> Replayed:
    """Rebuild a merge, compare its weights with those that were recorded, and score it again.

    Args:
        source: The merge.
        study: A study file or the folder of a run, to score it by; a run's own trial needs none.
        out: Folder to keep the rebuilt model in; by default it is removed.

    Raises:
        InputError: If there is nothing to compare it with, or it does not fit the study.
        RecipeError: If sources are no longer those that the recipe names.
    """
    run, plan = _scored_by(source, study)
    content = source.content or Content("")
    record = None if run is None else trial_of(run, source)
    if not (content.weights or source.weights or run or plan):
        raise InputError(
            f"{source.path}: expected something to compare the merge with, found none; name the "
            "folder of an export or of a run, or give --study"
        )
    for known in (plan, None if run is None else run.plan):
        if known is not None:
            check_head(known, content.head)
    with ExitStack() as stack:
        kept = out or Path(stack.enter_context(TemporaryDirectory(prefix="replay-"))) / "model"
        started = time.perf_counter()
        if source.recipe.mixture:
            export_mixture(source.recipe, kept, dtype=content.dtype, head=content.head)
        else:
            export_model(
                source.recipe, kept, dtype=content.dtype, threads=usable_cores(), head=content.head
            )
        seconds = time.perf_counter() - started
        scores = None
        if run is not None and record is not None:
            scores = score_by_run(run, record, kept, content.head)
        elif plan is not None:
            scores = score_by_study(plan, source, kept, content.head)
        return Replayed(
            source,
            open_checkpoint(str(kept)).fingerprint(),
            content.weights or None,
            None if source.weights is None else difference(kept, source.weights),
            scores,
            seconds,
        )


def _scored_by(source: ReplaySource, study: Path | None) -> tuple[Run | None, Plan | None]:
    """The run or the plan that a merge is scored by; neither where it is not scored."""
    if study is None:
        return source.run, None
    if source.run is not None:
        raise InputError("--study: expected none with a run, which has its own, received one")
    if study.is_dir():
        return open_run(study), None
    return None, study_plan(load_study(study))
