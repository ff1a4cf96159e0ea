"""The trials of a run as a table, in CSV and in Parquet, for spreadsheets and frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergesearch.evaluators import SPLITS
from mergesearch.merging import InputError
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.costs import PHASES
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.masking import without_secrets


def table_format(path: Path) -> Callable[[ReportData], bytes]:
    """What makes the content of a table from its data, by the ending of the file.

    Raises:
        InputError: If the ending is none of a table.
    """
    formats = {".csv": lambda data: trials_csv(data).encode(), ".parquet": trials_parquet}
    if path.suffix not in formats:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(formats)}")
    return formats[path.suffix]


def trials_csv(data: ReportData) -> str:
    """One line for each trial, with a header.

    Columns are the number, kind, name and state of a trial; value and standard error of each
    objective, on search items first; whether it keeps all bounds; seconds by phase; the mean
    coefficient of each direction; why it failed; and the earlier trial of the same merge whose
    values it was given. What was not measured is empty.
    """
    data = with_kept(data)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_columns(data))
    writer.writerows(_rows(data))
    return table.getvalue()


def trials_parquet(data: ReportData) -> bytes:
    """The same table as a Parquet file, with a type for each column; unmeasured values are null."""
    import pyarrow as pa
    from pyarrow import parquet

    data = with_kept(data)
    columns = _columns(data)
    arrow = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    schema = pa.schema([(name, arrow[kind]) for name, kind in columns.items()])
    rows = [dict(zip(columns, row, strict=True)) for row in _rows(data)]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema), file)
    return file.getvalue()


def _columns(data: ReportData) -> dict[str, type]:
    """Name of each column -> type of its values."""
    scores = [
        f"{'' if split == 'search' else f'{split} '}{objective.name}{kind}"
        for split in SPLITS
        for objective in data.objectives
        for kind in ("", " error")
    ]
    directions = () if data.kept is None else data.kept.directions
    return {
        "trial": int,
        "kind": str,
        "name": str,
        "state": str,
        **dict.fromkeys(scores, float),
        "feasible": bool,
        **{f"{phase} seconds": float for phase in PHASES},
        **{f"coefficient {name}": float for name in directions},
        "failure": str,
        "same as": int,
    }


def _rows(data: ReportData) -> list[list[Any]]:
    """Trials by number, a value for each column; None for what was not measured."""
    directions = 0 if data.kept is None else len(data.kept.directions)
    ordered = sorted(data.records, key=lambda record: record.number)
    return [_row(data, record, directions) for record in ordered]


def _row(data: ReportData, record: TrialSummary, directions: int) -> list[Any]:
    means: Sequence[Any] = () if data.kept is None else data.kept.means.get(record.number, ())
    failure = None if record.failure is None else without_secrets(record.failure.message)
    return [
        *(record.number, record.kind, record.name, record.state),
        *_scores(data, record),
        record.feasible if record.state == "complete" else None,
        *(record.seconds.get(phase) for phase in PHASES),
        *(means or [None] * directions),
        failure,
        record.same_as,
    ]


def _scores(data: ReportData, record: TrialSummary) -> list[float | None]:
    scores: list[float | None] = []
    for split in SPLITS:
        score = data.score(record, split)
        for objective in data.objectives:
            scores.append(None if score is None else score.values.get(objective.name))
            scores.append(None if score is None else score.errors.get(objective.name))
    return scores
