"""The reference of the study file, written from the declarations that check it.

``mergesearch help evaluators.command`` prints a topic, and ``make docs`` writes
docs/study-reference.md. Keys, defaults, limits and meanings are those of the models, operators and
strategies themselves, so the reference cannot differ from what is accepted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mergesearch.evaluators.spec.evaluators import SECTIONS, summary_of
from mergesearch.merging import InputError
from mergesearch.merging.errors import did_you_mean
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.pages import default
from mergesearch.merging.operators.schema import meaning, type_text
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import models_in
from mergesearch.search.strategies.pages import described, without_roles
from mergesearch.search.strategies.table import STRATEGIES

#: The topic of the whole file.
ROOT = "study"
REQUIRED = "required"
#: Keys that mean the same wherever they are.
SHARED = {"kind": "Which evaluator this is.", "metric": "Which of its scores."}
_INTRODUCTION = """# Study reference

Written by `make docs` from the declarations that check a study file. `mergesearch help TOPIC`
prints one topic, for example `mergesearch help evaluators.command`.
[study-file.md](study-file.md) says how the sections work together.
"""


@dataclass(frozen=True)
class KeyRow:
    """One key of a section.

    Attributes:
        key: Its name.
        type: What it may be, in words.
        default: As one would write it; :data:`REQUIRED` where there is none.
        meaning: What it is for.
        topic: Topic with the keys below it; empty where there are none.
    """

    key: str
    type: str
    default: str
    meaning: str
    topic: str = ""


@dataclass(frozen=True)
class Topic:
    """A section of the study file.

    Attributes:
        name: Dotted, without ``study`` but for the whole file.
        summary: What the section is for.
        rows: Its keys.
        kinds: Topics of which one is chosen, each with a line.
    """

    name: str
    summary: str
    rows: tuple[KeyRow, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The topic, JSON-able."""
        return asdict(self)

    def lines(self, width: int = 100) -> list[str]:
        """The topic as text of at most so many columns."""
        lines = [*wrap(f"{self.name}: {self.summary}", width), ""]
        for row in self.rows:
            stated = REQUIRED if row.default == REQUIRED else f"default {row.default}"
            text = [row.meaning] if row.meaning else []
            text += [f"its keys: mergesearch help {row.topic}"] if row.topic else []
            lines += wrap(f"{row.key}: {row.type}; {stated}", width, subsequent_indent="    ")
            for each in text:
                lines += wrap(each, width, initial_indent="    ", subsequent_indent="    ")
        longest = max((len(name) for name, _ in self.kinds), default=0)
        return [*lines, *(f"{name:<{longest}}  {text}" for name, text in self.kinds)]


def find_topic(name: str) -> Topic:
    """The topic of a dotted name, which may begin with ``study.``.

    Raises:
        InputError: If there is none of that name.
    """
    parts = [part for part in name.split(".") if part]
    if parts[:1] == [ROOT]:
        parts = parts[1:]
    if parts[:1] == ["evaluators"]:
        return _evaluators_topic(parts[1:])
    if parts[:1] == ["operator"] and parts[1:] != ["name"]:
        return _operator_topic(parts[1:])
    if parts[:1] == ["strategy"] and parts[1:] != ["name"]:
        return _strategy_topic(parts[1:])
    return _section_topic((), StudySpec, parts, "all sections of a study file")


def every_topic() -> Iterator[Topic]:
    """All topics, each once, the general ones first."""
    waiting = [ROOT]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        topic = find_topic(name)
        yield topic
        below = [row.topic for row in topic.rows if row.topic]
        waiting = [*below, *(kind for kind, _ in topic.kinds), *waiting]


def page() -> str:
    """The text of docs/study-reference.md."""
    return "\n".join([_INTRODUCTION, *(_page_section(topic) for topic in every_topic())])


def write_page(root: Path) -> None:
    """Write docs/study-reference.md under the repository's root."""
    (root / "docs" / "study-reference.md").write_text(page(), encoding="utf-8")


def _evaluators_topic(parts: Sequence[str]) -> Topic:
    if not parts:
        kinds = tuple(
            (f"evaluators.{kind}", summary_of(section)["summary"])
            for kind, section in SECTIONS.items()
        )
        return Topic("evaluators", "what a good merge is: a list of sections", (), kinds)
    kind = _one_of(parts[0], SECTIONS, "evaluators")
    section = SECTIONS[kind]
    return _section_topic(("evaluators", kind), section, parts[1:], summary_of(section)["summary"])


def _operator_topic(parts: Sequence[str]) -> Topic:
    if not parts:
        kinds = tuple((f"operator.{name}", each.summary) for name, each in OPERATORS.items())
        summary = "how weights combine: a name, or a section of the name and hyperparameters"
        return Topic("operator", summary, (), kinds)
    operator = OPERATORS[_one_of(parts[0], OPERATORS, "operator")]
    rows = tuple(
        KeyRow(name, _plain(type_text(each.annotation)), _text(default(each)), meaning(each))
        for name, each in operator.hyperparameters.items()
    )
    return Topic(f"operator.{operator.name}", f"{operator.summary} ({operator.paper})", rows)


def _strategy_topic(parts: Sequence[str]) -> Topic:
    if not parts:
        kinds = tuple((f"strategy.{name}", each.summary) for name, each in STRATEGIES.items())
        summary = "what is tried next: a name, auto, or a section of the name and options"
        return Topic("strategy", summary, (), kinds)
    strategy = STRATEGIES[_one_of(parts[0], STRATEGIES, "strategy")]
    meanings = described(inspect.getdoc(strategy.load()) or "")
    hints = get_type_hints(strategy.load().__init__, include_extras=True)
    rows = tuple(
        KeyRow(
            name,
            _plain(type_text(hints[name])),
            REQUIRED if each.default is each.empty else _text(each.default),
            without_roles(meanings.get(name, "")),
        )
        for name, each in strategy.options().items()
    )
    return Topic(f"strategy.{strategy.name}", f"{strategy.summary} ({strategy.source})", rows)


def _section_topic(
    above: tuple[str, ...], model: type[BaseModel], parts: Sequence[str], summary: str
) -> Topic:
    """The topic of a section, or of the key below it that ``parts`` name."""
    name = ".".join((*above, *parts))
    for part in parts:
        key = _one_of(part, model.model_fields, ".".join(above) or ROOT)
        field = model.model_fields[key]
        above = (*above, key)
        inner = models_in(field.annotation)
        if not inner:
            return Topic(name, field.description or "", (_row(above, field),))
        model = inner[0]
        summary = field.description or _first_line(model)
    rows = tuple(_row((*above, key), field) for key, field in model.model_fields.items())
    return Topic(name or ROOT, summary, rows)


def _row(path: tuple[str, ...], field: FieldInfo) -> KeyRow:
    inner = models_in(field.annotation)
    several = path[-1] in ("evaluators", "operator", "strategy")
    text = field.description or SHARED.get(path[-1], "")
    if not text and inner and not several:
        text = _first_line(inner[0])
    topic = ".".join(path) if inner else ""
    return KeyRow(path[-1], _type(field), _default(field), text, topic)


def _type(field: FieldInfo) -> str:
    if models_in(field.annotation):
        return "list of sections" if get_origin(field.annotation) is list else "section"
    if field.metadata:
        return _plain(type_text(Annotated[(field.annotation, *field.metadata)]))
    return _plain(type_text(field.annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True, validated_data={})
    return "that of its keys" if isinstance(value, BaseModel) else _text(value)


def _text(value: Any) -> str:
    """A default as one would write it in a study file."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """A type in words, for a terminal."""
    return text.replace("`", "")


def _first_line(model: type[BaseModel]) -> str:
    text = (inspect.getdoc(model) or "").split("\n")[0].rstrip(".")
    return without_roles(text)


def _one_of(part: str, known: Iterable[str], where: str) -> str:
    names = list(known)
    if part in names:
        return part
    raise InputError(
        f"help: expected a key of {where}, received {part!r}; {did_you_mean(part, names)}"
    )


def _page_section(topic: Topic) -> str:
    summary = (topic.summary[:1].upper() + topic.summary[1:]).rstrip(".")
    parts = [f"## {topic.name}", "", f"{summary}.", ""]
    if topic.rows:
        parts += ["| key | what it may be | default | meaning |", "|---|---|---|---|"]
        parts += [_table_row(row) for row in topic.rows]
        parts.append("")
    parts += [f"- {_link(name)}: {text}" for name, text in topic.kinds]
    return "\n".join([*parts, ""] if topic.kinds else parts)


def _table_row(row: KeyRow) -> str:
    key = _link(row.topic, f"`{row.key}`") if row.topic else f"`{row.key}`"
    cells = (key, row.type, f"`{row.default}`", row.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _link(topic: str, shown: str = "") -> str:
    return f"[{shown or f'`{topic}`'}](#{topic.replace('.', '')})"
