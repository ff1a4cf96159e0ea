"""Splits of items: checked, counted, known by their identities, and loaded by role.

Checking loads neither ``datasets`` nor torch. The three splits must be disjoint: an item that the
search has seen would flatter the winner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Split
from mergesearch.evaluators.data.columns import (
    LISTS,
    PICTURES,
    RECORDINGS,
    TEXTS,
    Columns,
    distinct,
    holds_media,
    inputs,
)
from mergesearch.evaluators.data.datasets_items import (
    count_items,
    datasets_table,
    load_datasets,
    must_convert,
)
from mergesearch.evaluators.data.identities import identities
from mergesearch.evaluators.data.item_files import ItemFiles, item_files
from mergesearch.evaluators.data.labels import check_tagged, largest_class
from mergesearch.evaluators.data.lending import Mask, joined, lent_items, rows_of
from mergesearch.evaluators.data.pictures import pixel_values, processor_folder
from mergesearch.evaluators.data.recordings import check_recordings, features
from mergesearch.evaluators.data.split_tables import read_splits
from mergesearch.evaluators.data.table_files import class_names
from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import shown, shown_names

if TYPE_CHECKING:
    import pyarrow as pa


class ItemTables:
    """The splits of files, read when they are first asked for.

    Args:
        data: Files and folders of items.
        columns: ``label``, ``domain``, ``id`` and inputs -> column; the first three may be None.
            Items without an id are identified by their first input.
        where: Key of the study file, for messages.
    """

    def __init__(self, data: Path | ItemFiles, columns: Columns, where: str) -> None:
        self._files = item_files(data)
        self._columns = columns
        self._where = where
        self._read: dict[str, pa.Table] | None = None
        self._counts: dict[str, int] = {}
        self._named: dict[str, npt.NDArray[np.str_]] = {}
        self._lender = ""
        self._borrower = ""
        self._share = 0.0
        #: Domain ("" without) -> its largest class number, once checked.
        self.largest: dict[str, int] = {}

    def lend(self, share: float, lender: str, borrower: str) -> None:
        """Let a split have some items of another one (:mod:`mergesearch.evaluators.data.lending`).

        Args:
            share: Part of the lender's items.
            lender: Split that has them in the files.
            borrower: Split that counts and loads them, after its own.
        """
        self._share = share
        self._lender = lender
        self._borrower = borrower

    @cached_property
    def _lent(self) -> Mask:
        """Which of the lender's items are lent ``(items,)``."""
        column = {"domain": self._columns.get("domain")}
        loaded = self._load(self._lender, column) if column["domain"] else {}
        count = self._count(self._lender)
        return lent_items(
            np.asarray(loaded.get("domain", [""] * count)).astype(np.str_), self._share
        )

    def check(self, splits: Mapping[Split, str]) -> dict[Split, set[str]]:
        """Check splits and columns, and return the domains of each split.

        Missing, empty or overlapping splits and missing or wrong columns are refused.

        Args:
            splits: Role -> name of the split.

        Raises:
            InputError: In one line.
        """
        tables = {role: self._table(name) for role, name in splits.items()}
        ids = {role: set(identities(table, self._columns)) for role, table in tables.items()}
        for one, other in combinations(ids, 2):
            shared = ids[one] & ids[other]
            if shared:
                raise InputError(
                    f"{self._where}: {self._files}: expected disjoint splits, received "
                    f"{len(shared)} items in both {splits[one]!r} and {splits[other]!r}, for "
                    f"example {shown(min(shared))}"
                )
        for role, table in tables.items():
            self._check_media(table)
            self._check_classes(splits[role], table)
        return {
            role: self._domains(splits[role], table, self._columns.get("domain"))
            for role, table in tables.items()
        }

    def _check_classes(self, split: str, table: pa.Table) -> None:
        """Refuse tags that are no match for their words, and note the largest class."""
        words = self._columns.get("words")
        tags = self._columns.get("tags")
        if words is not None and tags is not None:
            check_tagged(table, words, tags, f"{self._where}: {self._files}: {split}")
        column = tags or self._columns.get("label")
        if column is None:
            return
        domain = self._columns.get("domain")
        names = self._domain_names(split, domain)
        for value, largest in largest_class(table, column, domain).items():
            name = names[int(value)] if names else value
            self.largest[name] = max(largest, self.largest.get(name, -1))

    def _check_media(self, table: pa.Table) -> None:
        """Refuse pictures and recordings that no processor makes a model's inputs of."""
        checkpoint = self._files.checkpoint
        for role, column in inputs(self._columns).items():
            values = table.column(column)
            if not holds_media(values.type):
                continue
            if role in RECORDINGS:
                from pyarrow import compute

                seconds = compute.max(compute.struct_field(values, "size")).as_py()
                check_recordings(seconds, role, checkpoint, self._where)
            else:
                processor_folder(checkpoint, self._where)

    def identities(self, split: str) -> set[str]:
        """Hashes of the first input of every item, which are the same in every data set.

        Ids are not read, since two data sets may number alike.

        Raises:
            InputError: If the split or a column is missing.
        """
        return set(identities(self._table(split), {**self._columns, "id": None}))

    def domains(self, split: str) -> npt.NDArray[np.str_]:
        """Domain of each item of a split ``(items,)``, "" without domains; no input is read."""
        if split not in self._named:
            column = {"domain": self._columns.get("domain")}
            found = self.load(split, column)["domain"] if column["domain"] else None
            self._named[split] = (
                np.full(self.count(split), "")
                if found is None
                else np.asarray(found).astype(np.str_)
            )
        return self._named[split]

    def count(self, split: str) -> int:
        """Number of items of a split that :meth:`check` has seen, with those lent to it."""
        count = self._count(split)
        if self._share and split in (self._lender, self._borrower):
            lent = int(self._lent.sum())
            count += lent if split == self._borrower else -lent
        return count

    def _count(self, split: str) -> int:
        if split not in self._counts:
            folder = self._plain(split, self._columns)
            self._counts[split] = (
                self._table(split).num_rows if folder is None else count_items(folder / split)
            )
        return self._counts[split]

    def load(self, split: str, columns: Columns | None = None) -> dict[str, Any]:
        """Load the columns of a split by role: classes as numbers, domains as names.

        Args:
            split: Name of the split.
            columns: Some of the columns; None takes all.
        """
        own = self._load(split, columns)
        if self._share and split == self._lender:
            return {role: rows_of(values, ~self._lent) for role, values in own.items()}
        if self._share and split == self._borrower:
            lent = self._load(self._lender, columns)
            return {
                role: joined(values, rows_of(lent[role], self._lent))
                for role, values in own.items()
            }
        return own

    def _load(self, split: str, columns: Columns | None) -> dict[str, Any]:
        wanted = self._columns if columns is None else columns
        folder = self._plain(split, wanted)
        if folder is not None:
            return load_datasets(folder / split, wanted)
        table = self._table(split)
        return {
            role: _values(table, role, column, self._files, self._where)
            for role, column in wanted.items()
            if column is not None
        }

    def release(self) -> None:
        """Forget the rows; they are read again when they are asked for."""
        for split in self._read or ():
            self.count(split)
        self._read = None

    def _plain(self, split: str, columns: Columns) -> Path | None:
        """The `datasets` folder, if `datasets` can load the columns of a split as they are."""
        folder = self._files.datasets_folder
        return None if folder is None or must_convert(folder / split, columns) else folder

    def _table(self, split: str) -> pa.Table:
        """A split with the columns in question and at least one item."""
        folder = self._plain(split, self._columns)
        if folder is not None:
            return datasets_table(folder, split, self._columns, self._where)
        if self._read is None:
            self._read = read_splits(self._files, self._columns, self._where)
        if split not in self._read:
            raise InputError(
                f"{self._where}: {self._files}: expected a split {split!r}, found only "
                f"{shown_names(self._read)}; name them in splits"
            )
        return self._read[split]

    def _domains(self, split: str, table: pa.Table, column: str | None) -> set[str]:
        """Names of the domains of a split.

        A column of class numbers has its names in the description of the data.
        """
        if column is None:
            return set()
        names = self._domain_names(split, column)
        values = distinct(table.column(column))
        return {names[value] if names else str(value) for value in values}

    def _domain_names(self, split: str, column: str | None) -> Sequence[str]:
        """Names of domains that are numbers in the data; empty where they are names there."""
        folder = self._plain(split, self._columns)
        if folder is None or column is None:
            return ()
        return class_names(folder / split).get(column, ())


def _values(table: pa.Table, role: str, column: str, files: ItemFiles, where: str) -> Any:
    """The values of a column in the form that its role has."""
    values = table.column(column).to_pylist()
    if role in (*TEXTS, *LISTS, "domain", "id", "tags", "picture"):
        return values
    if role == "label":
        return np.array(values, np.int64)
    media = holds_media(table.schema.field(column).type)
    if role in PICTURES and media:
        return pixel_values(values, files.checkpoint, f"{where}: column {column!r}")
    if role in RECORDINGS and media:
        values = features(values, role, files.checkpoint, where)
    rows = [np.asarray(value) for value in values]
    if len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    ragged = np.empty(len(rows), dtype=object)
    ragged[:] = rows
    return ragged
