"""What operators declare, as rows for listings and as pages for the documentation.

``make docs`` writes one page per family to ``docs/operators``; nothing in those pages is written by
hand.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

from mergesearch.merging.operators import IDENTITIES, OPERATORS, Operator
from mergesearch.merging.operators.base import OperatorFamily
from mergesearch.merging.operators.schema import count_text, meaning, type_text

FAMILIES: Mapping[str, str] = {
    "linear": "Linear family: weighted sums of experts and task vectors",
    "sparse": "Sparse family: task vectors that are trimmed, masked and elected",
    "spectral": "Spectral family: matrices seen through their singular vectors",
    "column": "Column family: norms and directions of columns",
    "data": "Data family: statistics of calibration data",
    "learned": "Learned family: masks that are trained",
}

#: Numbers of experts for which defaults and bounds are shown.
_SHOWN = (2, 4, 8)

#: Each :data:`mergesearch.merging.operators.base.PreparationScope` in words.
_SCOPES: Mapping[str, str] = {
    "E": "one element of all experts",
    "R": "a row of all experts",
    "T": "a tensor of all experts",
    "G": "statistics of the whole model first (streamed), then a tensor of all experts",
    "S": "forward passes in depth order",
}


def operator_row(operator: Operator) -> dict[str, Any]:
    """What ``mergesearch ls operators`` says about one operator, JSON-able."""
    return {
        "name": operator.name,
        "family": operator.family,
        "summary": operator.summary,
        "paper": operator.paper,
        "needs": ["weights", *sorted(operator.needs)],
        "experts": list(operator.experts),
        "defaults": {name: _plain(default(p)) for name, p in operator.hyperparameters.items()},
        "coefficient": coefficient(operator),
        **({"when": operator.when} if operator.when else {}),
    }


def coefficient(operator: Operator) -> str:
    """The default coefficient, with the number of experts where it depends on it."""
    options = {name: default(p) for name, p in operator.hyperparameters.items()}
    least, most = operator.experts
    counts = [count for count in _SHOWN if count >= least and (most is None or count <= most)] or [
        least
    ]
    values = [operator.default(count, options) for count in counts]
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return ", ".join(f"{value:g} (K={count})" for count, value in zip(counts, values, strict=True))


def default(parameter: inspect.Parameter) -> Any:
    """Default of a hyperparameter, ``"required"`` where it has none."""
    return "required" if parameter.default is parameter.empty else parameter.default


def write_pages(folder: Path) -> None:
    """Write one page per family, and the list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> Markdown: a page per family, and ``README.md``, the list of all operators."""
    members = {
        family: [o for o in OPERATORS.own.values() if o.family == family]
        for family in get_args(OperatorFamily)
    }
    written = {f"{family}.md": _family_page(family, ops) for family, ops in members.items() if ops}
    return {"README.md": _index(members), **written, "special.md": _special_page()}


#: Cross-references of docstrings, which Markdown does not know.
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")

_GENERATED = (
    "*Written by `make docs` from what the operators declare; edit the operators' files instead.*"
)


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: cross-references become code, sections for callers are left out."""
    text, *_ = inspect.cleandoc(docstring or "").split("\n\nRaises:\n")
    return _ROLE.sub(r"`\1`", text)


def _index(members: Mapping[str, list[Operator]]) -> str:
    lines = [
        "# Operators",
        "",
        _GENERATED,
        "",
        "| operator | family | needs | coefficient | paper |",
        "|---|---|---|---|---|",
    ]
    for family, operators in members.items():
        for operator in operators:
            row = operator_row(operator)
            link = f"[{operator.name}]({family}.md#{operator.name.replace(' ', '-')})"
            lines.append(
                f"| {link} | {family} | {', '.join(row['needs'])} | {row['coefficient']} | "
                f"{row['paper']} |"
            )
    lines += [
        "",
        "## Identities",
        "",
        "Every operator is tested for exactly those that it declares; the others fail.",
        "",
    ]
    lines += [f"- **{name.replace('_', ' ')}**: {text}" for name, text in IDENTITIES.items()]
    return "\n".join(lines) + "\n"


def _special_page() -> str:
    """The policies for special tensors, from their declarations."""
    from mergesearch.merging.policies import TensorPolicies

    lines = [
        "# Special tensors",
        "",
        _GENERATED,
        "",
        prose(sys.modules[TensorPolicies.__module__].__doc__),
        "",
        (
            "Written as `special: {NAME: CHOICE}` in recipes and study files, or `special={...}` "
            "in `mergesearch.merge`."
        ),
        "",
    ]
    lines += ["| policy | choices | default | meaning |", "|---|---|---|---|"]
    for name, info in TensorPolicies.model_fields.items():
        choices = (
            "items, as for data operators" if name == "calibration" else type_text(info.annotation)
        )
        lines.append(f"| `{name}` | {choices} | `{info.default}` | {info.description} |")
    return "\n".join(lines) + "\n"


def _family_page(family: str, operators: list[Operator]) -> str:
    parts = [f"# {FAMILIES[family]}", _GENERATED]
    described: set[str] = set()
    for operator in operators:
        module = operator.prepare.__module__
        about = "" if module in described else prose(sys.modules[module].__doc__)
        described.add(module)
        parts.append(_section(operator, about))
    if any("calibration" in operator.hyperparameters for operator in operators):
        parts.append(_calibration())
    return "\n\n".join(parts) + "\n"


def _calibration() -> str:
    """The keys of ``calibration``, from its declaration."""
    from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec

    lines = [
        "## calibration",
        "",
        "The items that the model is run on, as a mapping with these keys.",
        "",
    ]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, annotation in get_type_hints(CalibrationSpec, include_extras=True).items():
        optional = get_origin(annotation) is NotRequired
        inner = get_args(annotation)[0] if optional else annotation
        known = f"`{shown(DEFAULTS.get(name, 'left out' if optional else 'required'))}`"
        what = meaning(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=inner))
        lines.append(f"| `{name}` | {type_text(inner)} | {known} | {what} |")
    return "\n".join(lines)


def _section(operator: Operator, about: str) -> str:
    parts = [
        f"## {operator.name}",
        f"{operator.summary[0].upper()}{operator.summary[1:]}.",
        f"*{operator.paper}.*",
    ]
    if operator.when:
        parts.append(f"Use it {operator.when}.")
    if about:
        parts.append(about)
    parts.append(prose(operator.prepare.__doc__))
    parts.append(_facts(operator))
    if operator.hyperparameters:
        parts.append(_hyperparameters(operator))
    return "\n\n".join(parts)


def _facts(operator: Operator) -> str:
    options = {name: default(p) for name, p in operator.hyperparameters.items()}
    least, most = operator.experts
    count = max(least, 4 if most is None else min(4, most))
    low, high = operator.bounds(count, options)
    experts = count_text(least, most, f"{least} or more")
    traits = [
        word
        for word, flag in (
            ("order-sensitive", operator.order_sensitive),
            ("random", operator.stochastic),
        )
        if flag
    ]
    lines = [
        f"- needs: {', '.join(['weights', *sorted(operator.needs)])}; experts: {experts}",
        f"- coefficient: {coefficient(operator)}, searched in [{low:g}, {high:g}] (K={count})",
        f"- preparation reads {_SCOPES[operator.scope]}"
        + (f"; {', '.join(traits)}" if traits else ""),
        f"- holds: {_identities(operator.identities)}",
    ]
    if operator.plain:
        settings = ", ".join(f"{name} {shown(value)}" for name, value in operator.plain.items())
        more = operator.plain_identities - operator.identities
        lines.append(
            f"- with {settings} also: {_identities(more)}"
            if more
            else f"- with {settings}: nothing more"
        )
    return "\n".join(lines)


def _identities(names: frozenset[str]) -> str:
    return ", ".join(
        f"[{name.replace('_', ' ')}](README.md#identities)" for name in IDENTITIES if name in names
    )


def _hyperparameters(operator: Operator) -> str:
    lines = ["| hyperparameter | type | default | meaning |", "|---|---|---|---|"]
    for name, parameter in operator.hyperparameters.items():
        cells = (
            f"`{name}`",
            type_text(parameter.annotation),
            f"`{shown(default(parameter))}`",
            meaning(parameter),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as pages show it: numbers with four significant digits."""
    if isinstance(value, list):
        return f"[{', '.join(shown(item) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return (
        value
        if value is None or isinstance(value, str | int | float | bool | list | dict)
        else str(value)
    )
