"""Whether a rebuilt merge makes the outputs that people judged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from mergesearch.evaluators import Measurement, Split
from mergesearch.evaluators.base import Exhibit
from mergesearch.evaluators.preference.pairing import digest
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.panel import prompt_digest
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.record.trial_record import Score


def settled(
    measured: Measurement, recorded: Score, folder: Path, split: Split, recipe: str
) -> Measurement:
    """A measurement with the recorded strengths where the outputs are those that were judged.

    Nobody is asked again: the same outputs deserve the same choices. Where an output is another,
    the value is not a number.

    Args:
        measured: The second score of a merge.
        recorded: The first one.
        folder: Folder of the run.
        split: The items.
        recipe: Digest of the merge.
    """
    if not measured.exhibits:
        return measured
    bench = Bench(JudgingRecord(folder), seed=0)
    values = dict(measured.values)
    errors = dict(measured.errors)
    for objective, exhibit in measured.exhibits.items():
        same = bench.outputs_of(objective, split, recipe) == _outputs(exhibit)
        values[objective] = recorded.values[objective] if same else math.nan
        errors[objective] = recorded.errors.get(objective, math.nan)
    return replace(measured, values=values, errors=errors, exhibits={})


def _outputs(exhibit: Exhibit) -> dict[str, str]:
    return {
        prompt_digest(output.prompt): digest(output.content, output.kind)
        for output in exhibit.outputs
    }
