"""Optuna's tables in a database, as far as trials are written and read without its objects.

Optuna has no public way to write several trials at once, and needs some fifty statements for one.
The layout of its tables is a format with a version, which its migrations keep: only databases of a
version that is listed here are written and read by statements of our own.
``tests/search/record/test_tables.py`` compares the layout with what Optuna creates.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

#: Versions of the layout that are known; see ``RDBStorage.get_current_version``.
KNOWN_VERSIONS = frozenset({"v3.2.0.a"})
#: Databases whose tables are read so.
KNOWN_DIALECTS = frozenset({"postgresql", "sqlite"})

STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
VALUE_TYPES = ("FINITE", "INF_POS", "INF_NEG")
INFINITIES = {"INF_POS": float("inf"), "INF_NEG": float("-inf")}
OTHERS = INFINITIES | {"NAN": float("nan")}


@cache
def table(name: str) -> sa.Table:
    """One of Optuna's tables, with the columns that are used here."""
    import sqlalchemy as sa

    columns: dict[str, list[sa.Column[Any]]] = {
        "studies": [sa.Column("study_id", sa.Integer, primary_key=True)],
        "trials": [
            sa.Column("trial_id", sa.Integer, primary_key=True),
            sa.Column("number", sa.Integer),
            sa.Column("study_id", sa.Integer),
            sa.Column("state", sa.Enum(*STATES, name="trialstate"), nullable=False),
            sa.Column("datetime_start", sa.DateTime),
            sa.Column("datetime_complete", sa.DateTime),
        ],
        "trial_params": [
            sa.Column("param_id", sa.Integer, primary_key=True),
            sa.Column("trial_id", sa.Integer),
            sa.Column("param_name", sa.String(512)),
            sa.Column("param_value", sa.Float(53)),
            sa.Column("distribution_json", sa.Text),
        ],
        "trial_user_attributes": [
            sa.Column("trial_user_attribute_id", sa.Integer, primary_key=True),
            *_attribute_columns(),
        ],
        "trial_system_attributes": [
            sa.Column("trial_system_attribute_id", sa.Integer, primary_key=True),
            *_attribute_columns(),
        ],
        "trial_values": [
            sa.Column("trial_value_id", sa.Integer, primary_key=True),
            sa.Column("trial_id", sa.Integer, nullable=False),
            sa.Column("objective", sa.Integer, nullable=False),
            sa.Column("value", sa.Float(53)),
            sa.Column("value_type", sa.Enum(*VALUE_TYPES, name="trialvaluetype"), nullable=False),
        ],
        "trial_intermediate_values": [
            sa.Column("trial_intermediate_value_id", sa.Integer, primary_key=True),
            sa.Column("trial_id", sa.Integer, nullable=False),
            sa.Column("step", sa.Integer, nullable=False),
            sa.Column("intermediate_value", sa.Float(53)),
            sa.Column(
                "intermediate_value_type",
                sa.Enum(*VALUE_TYPES, "NAN", name="trialintermediatevaluetype"),
                nullable=False,
            ),
        ],
    }
    return sa.Table(name, sa.MetaData(), *columns[name])


#: The tables that are known.
TABLES = (
    "studies",
    "trials",
    "trial_params",
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_values",
    "trial_intermediate_values",
)


def _attribute_columns() -> list[sa.Column[Any]]:
    import sqlalchemy as sa

    return [
        sa.Column("trial_id", sa.Integer),
        sa.Column("key", sa.String(512)),
        sa.Column("value_json", sa.Text),
    ]


def moment() -> datetime:
    """Now, as Optuna keeps it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def local_time(moment: datetime | None) -> datetime | None:
    """A moment of the tables as Optuna's trials have it: in local time, without saying so."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def stored_value(value: float) -> tuple[float | None, str]:
    """A value and its type, as the table of values keeps it; it has no infinities."""
    for kind, infinity in INFINITIES.items():
        if value == infinity:
            return None, kind
    return value, "FINITE"


def value_of(value: float | None, kind: str) -> float:
    """Inverse of :func:`stored_value`."""
    return float(value) if kind == "FINITE" and value is not None else OTHERS[kind]


@lru_cache(maxsize=256)  # a study has few
def distribution_text(low: float, high: float) -> str:
    """The uniform distribution between two bounds as Optuna writes it."""
    from optuna.distributions import FloatDistribution, distribution_to_json

    return distribution_to_json(FloatDistribution(low, high))


def json_text(value: Any) -> str:
    """An attribute's value as Optuna writes it."""
    return json.dumps(value)
