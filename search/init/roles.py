"""Which column is the text, which the label, and so on, by names, types and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mergesearch.merging import InputError
from mergesearch.merging.errors import did_you_mean
from mergesearch.search.init.tables import Column, DataFile

#: Role -> names that such a column often has, the likeliest first.
USUAL: Mapping[str, Sequence[str]] = {
    "text": (
        *("text", "sentence", "review", "content", "body", "comment", "message", "utterance"),
        *("tweet", "document", "question", "input", "source", "query", "title"),
        *("transcription", "transcript"),
    ),
    "label": (
        *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic"),
        *("stars", "rating", "emotion", "y"),
    ),
    "number": ("score", "number", "label", "target", "rating", "similarity", "y"),
    "words": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "prompt": ("prompt", "question", "instruction", "input", "query"),
    "target": ("target", "answer", "completion", "output", "response", "summary", "translation"),
    "image": ("image", "pixels", "pixel_values", "picture", "file", "path"),
    "audio": ("audio", "file", "path", "recording"),
    "domain": ("domain", "task"),
    "mask": ("mask", "masks", "segmentation", "annotation"),
    "boxes": ("input_boxes", "boxes", "box", "bbox", "bboxes"),
    "points": ("input_points", "points"),
    "point_labels": ("input_labels", "point_labels"),
    "question": ("question", "query", "prompt", "text"),
    "answer": ("answer", "target", "label", "output", "response"),
    "answers": ("answers",),
    "query": ("query", "question", "anchor", "title"),
    "document": ("document", "passage", "positive", "context", "answer", "body"),
    "chosen": ("chosen", "preferred", "better"),
    "rejected": ("rejected", "dispreferred", "worse"),
}
#: Names of two columns whose texts belong together.
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("text", "pair"),
)
#: Values of a column of domains at most.
MOST_DOMAINS = 30


@dataclass(frozen=True)
class Finder:
    """Looks for columns of one set of items.

    Attributes:
        data: The items.
        given: Role -> column, where the user says so and the items have it.
    """

    data: DataFile
    given: Mapping[str, str]

    def find(self, role: str, kinds: Collection[str], taken: Collection[str] = ()) -> Column | None:
        """The column that the user names, has a usual name, or is the only one of its kind."""
        if role in self.given:
            return self.data.columns[self.given[role]]
        free = [
            column
            for column in self.data.columns.values()
            if column.kind in kinds
            and column.name not in (*taken, *self.given.values(), self.data.split_column)
        ]
        for name in USUAL[role]:
            for column in free:
                if column.name.lower() == name:
                    return column
        return free[0] if len(free) == 1 else None

    def usual(self, role: str, kinds: Collection[str]) -> Column | None:
        """The column that the user names, or that has a usual name."""
        if role in self.given:
            return self.data.columns[self.given[role]]
        columns = {c.name.lower(): c for c in self.data.columns.values() if c.kind in kinds}
        return next((columns[name] for name in USUAL[role] if name in columns), None)

    def need(
        self, role: str, kinds: Collection[str], what: str, taken: Collection[str] = ()
    ) -> Column:
        """The same, or a refusal that says how to name the column.

        Raises:
            InputError: If there is none.
        """
        found = self.find(role, kinds, taken)
        if found is None:
            raise self.missing(role, what)
        return found

    def missing(self, role: str, what: str) -> InputError:
        """The refusal of data without a column."""
        return InputError(
            f"--data {self.data.given}: expected a column of {what}, found none that is surely "
            f"one among {self.data.listed}; name it with --column {role}=NAME, or add it"
        )

    def text(self, taken: Collection[str]) -> Column:
        """The column of texts: by its name, else the one with the longest texts.

        Raises:
            InputError: If there is none.
        """
        found = self.find("text", ("text",), taken)
        if found is not None:
            return found
        texts = [c for c in self.data.columns.values() if c.kind == "text" and c.name not in taken]
        if not texts:
            raise self.missing("text", "texts")
        return max(texts, key=lambda column: column.words)

    def pair(self) -> tuple[Column, Column] | None:
        """Two columns of texts that are read together, by their names."""
        columns = {c.name.lower(): c for c in self.data.columns.values() if c.kind == "text"}
        if {"text", "pair"} <= self.given.keys():
            return self.data.columns[self.given["text"]], self.data.columns[self.given["pair"]]
        found = next((pair for pair in PAIRS if {*pair} <= columns.keys()), None)
        if found is None or "text" in self.given:
            return None
        return columns[found[0]], columns[found[1]]

    def label(self, names: Sequence[str], count: int, taken: Collection[str] = ()) -> Column:
        """The column of classes: of a usual name, else the one whose values are the classes.

        Args:
            names: Of the classes; empty where no model names them.
            count: How many there are.
            taken: Columns that hold something else.

        Raises:
            InputError: If there is none, or its values are no classes of the models.
        """
        columns = self.data.columns.values()
        likely = self.find("label", ("text", "integer"), taken)
        free = [c for c in columns if c.name not in taken and c.kind in ("text", "integer")]
        fitting = [column for column in free if fits(column, names, count)]
        if "label" in self.given and likely is not None:
            return self._checked(likely, names, count)
        usual = next((c for c in fitting if c.name.lower() in USUAL["label"]), None)
        if usual is not None:
            return usual
        by_value = [column for column in fitting if column.kind == "text" and names]
        if len(by_value) == 1:
            return by_value[0]
        if likely is not None and likely.name.lower() in USUAL["label"]:
            return self._checked(likely, names, count)
        shown = f"among {shortened(names)}" if names else "that are classes"
        raise self.missing("label", f"classes, with values {shown} or numbers below {count}")

    def _checked(self, column: Column, names: Sequence[str], count: int) -> Column:
        if fits(column, names, count):
            return column
        odd = sorted(map(str, column.values - {*names}))
        raise InputError(
            f"--data {self.data.given}: column {column.name!r}: expected classes of the models, "
            f"{shortened(names) if names else f'numbers below {count}'}, received "
            f"{shortened(odd)}; rename them in the file, or give the names in the order of the "
            "model's numbers with --classes A,B,..."
        )

    def domain(self, experts: Collection[str], taken: Collection[str]) -> Column | None:
        """The column that says which task an item belongs to, if there is one."""
        if "domain" in self.given:
            return self.data.columns[self.given["domain"]]
        values = {
            column.name: frozenset(self.data.named.get(column.name, column.values))
            for column in self.data.columns.values()
            if column.name not in taken
            and (column.kind == "text" or column.name in self.data.named)
        }
        several = {name: own for name, own in values.items() if 1 < len(own) <= MOST_DOMAINS}
        named = [name for name, own in several.items() if own <= {*experts}]
        usual = [name for name in several if name.lower() in USUAL["domain"]]
        found = next(iter([*named, *usual]), None)
        return None if found is None else self.data.columns[found]


def check_given(given: Mapping[str, str], data: Sequence[DataFile]) -> None:
    """Refuse roles that there are not, and columns that no data have.

    Raises:
        InputError: In one line.
    """
    columns = {name for file in data for name in file.columns}
    for role, column in given.items():
        if role not in (*USUAL, "pair"):
            raise InputError(
                f"--column {role}={column}: expected a role of a column; "
                f"{did_you_mean(role, [*USUAL, 'pair'])}"
            )
        if data and column not in columns:
            raise InputError(
                f"--column {role}={column}: expected a column of "
                f"{', '.join(file.given for file in data)}; {did_you_mean(column, columns)}"
            )


def fits(column: Column, names: Sequence[str], count: int) -> bool:
    """Whether the values of a column can be classes."""
    if not column.values:
        return False
    if column.kind == "integer":
        return bool(min(column.values) >= 0 and max(column.values) < count)
    return column.values <= {*names} if names else column.distinct <= count


def shortened(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
