"""The study file: YAML -> validated, frozen, fully resolved :class:`StudySpec`.

Unknown keys are refused with the known ones listed; every error is one line that names the file,
the key, the value and what is allowed. Relative paths are relative to the study file. Nothing here
reads weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mergesearch.evaluators.spec.data import resolve_data
from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.locations import absolute_path
from mergesearch.merging.extensions.references import find, is_reference, located
from mergesearch.merging.models.calibration_spec import absolute as in_full
from mergesearch.merging.policies import located_special
from mergesearch.search.spec.renamed import refuse_old_names
from mergesearch.search.spec.sections import (
    BARE,
    OperatorSection,
    StartSection,
    StrategySection,
    StudySpec,
)
from mergesearch.search.spec.shortening import shortened
from mergesearch.search.spec.trackers import TrackerSpec


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in ``data``; the value is read as YAML, an index of a list is a number.

    Raises:
        InputError: If the text has no ``=`` or walks through something that is not a section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE, for example budget.trials=50")
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if part in BARE and isinstance(node.get(part), str):
                # A bare name becomes a section: `strategy: cma_es` and `strategy.sigma=0.1`.
                node[part] = {BARE[part]: node[part]}
            node = node.setdefault(part, {})
        else:
            raise InputError(
                f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section of the study "
                "file"
            )
    value = yaml.safe_load(text)
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise InputError(
            f"--set {override}: {'.'.join(parents)} is not a section of the study file"
        )


def validate(data: Mapping[str, Any], where: str) -> StudySpec:
    """Validate a mapping; ``where`` names the file in errors.

    Raises:
        InputError: One line for the first problem, and how many more there are.
    """
    refuse_old_names(data, where)
    try:
        spec = StudySpec.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, StudySpec)}") from None
    return spec


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem of a pydantic error: key, value, what is allowed."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in _path(first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(known_keys(model, first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}known: {', '.join(known)}{more}"
    if first["type"] == "missing":
        return f"{key}: required key is missing{more}"
    return (
        f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, received "
        f"{shortened(first['input'])}{more}"
    )


def _path(loc: Sequence[int | str]) -> Iterator[int | str]:
    """Location without the tags of unions: ``evaluators.0.synthetic.problem`` has one."""
    for index, part in enumerate(loc):
        tag = (
            index > 0
            and isinstance(loc[index - 1], int)
            and isinstance(part, str)
            and index + 1 < len(loc)
        )
        if not tag:
            yield part


def known_keys(model: type[BaseModel], loc: Sequence[int | str]) -> set[str]:
    """Keys of the section at ``loc``, as its model declares them."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        sections = [
            inner
            for outer in models
            if part in outer.model_fields
            for inner in _models_in(outer.model_fields[part].annotation)
        ]
        # A union tag is the value of a discriminator (`kind`), not a field name.
        tagged = [
            m
            for m in models
            if any(part in get_args(f.annotation) for f in m.model_fields.values())
        ]
        models = sections or tagged or _plugin_sections(part) or models
    return {name for outer in models for name in outer.model_fields}


def _plugin_sections(kind: str) -> list[type[BaseModel]]:
    """The section of an evaluator that a plug-in adds, if the kind is one."""
    return [SECTIONS[kind]] if kind in SECTIONS else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Make local paths absolute.

    Names that are no local paths are left for the hub (``org/name@revision``).
    """

    def absolute(path: str) -> str:
        resolved = absolute_path(path, folder)
        unchanged = resolved == path
        return str((folder / path).resolve()) if unchanged and path.startswith(".") else resolved

    base = None if spec.base is None else absolute(spec.base)
    experts = {name: absolute(path) for name, path in spec.experts.items()}
    resolved = spec.model_copy(
        update={
            "base": base,
            "experts": experts,
            "special": located_special(spec.special, absolute),
            "operator": OperatorSection(
                name=spec.operator.name, **in_full(spec.operator.options, folder)
            ),
            "start": _resolve_start(spec.start, folder),
            "trackers": [_resolve_tracker(tracker, folder) for tracker in spec.trackers],
            "evaluators": [
                _resolve_evaluator(e, folder, base, experts, absolute) for e in spec.evaluators
            ],
        }
    )
    _check_code(resolved)
    return _with_code(resolved, folder)


def _check_code(spec: StudySpec) -> None:
    """Refuse to run code which the study names, unless the study allows it."""
    for key, name in references_of(spec).items():
        if not spec.allow_code:
            raise InputError(
                f"{key}: {name} runs code that the study names; if you trust it, set allow_code: "
                "true at the top of the study file"
            )
    for index, evaluator in enumerate(spec.evaluators):
        if getattr(evaluator, "runs_code", False) and not spec.allow_code:
            raise InputError(
                f"evaluators.{index}: {evaluator.kind} runs code that the study names; if you "
                "trust it, set allow_code: true at the top of the study file"
            )


def references_of(spec: StudySpec) -> dict[str, str]:
    """Key -> name of the operator and the strategy that are objects of the user's."""
    named = {"operator.name": spec.operator.name, "strategy.name": spec.strategy.name}
    return {key: name for key, name in named.items() if is_reference(name)}


def find_references(spec: StudySpec) -> None:
    """Import the operator and the strategy of a study that allows it, so that tables know them.

    Raises:
        InputError: If one cannot be imported.
    """
    for key, name in references_of(spec).items():
        find(name, key)


def _with_code(spec: StudySpec, folder: Path) -> StudySpec:
    """The study with the code that it names imported, and the digests of its functions."""
    operator = OperatorSection(
        **(spec.operator.options | {"name": located(spec.operator.name, folder)})
    )
    strategy = StrategySection(
        **(spec.strategy.options | {"name": located(spec.strategy.name, folder)})
    )
    evaluators = [
        evaluator.loaded(folder, f"evaluators.{index}")
        if hasattr(evaluator, "loaded")
        else evaluator
        for index, evaluator in enumerate(spec.evaluators)
    ]
    found = spec.model_copy(
        update={"operator": operator, "strategy": strategy, "evaluators": evaluators}
    )
    find_references(found)
    return found


def _resolve_start(start: StartSection | None, folder: Path) -> StartSection | None:
    """The start with the folders of its runs, beside the study file or in the current folder.

    The latter is where commands make ``runs/``.
    """
    if start is None:
        return None

    def found(run: str) -> str:
        beside = folder / run
        here = Path(run)
        return str((here if here.exists() and not beside.exists() else beside).resolve())

    if start.priors is not None:
        return start.model_copy(update={"priors": [found(run) for run in start.priors]})
    assert start.run is not None
    return start.model_copy(update={"run": found(start.run)})


def _resolve_tracker(tracker: TrackerSpec, folder: Path) -> TrackerSpec:
    """The tracker with its folder, which is relative to the study file."""
    if tracker.folder is None:
        return tracker
    return tracker.model_copy(update={"folder": str((folder / tracker.folder).resolve())})


def _resolve_evaluator(
    spec: Any,
    folder: Path,
    base: str | None,
    experts: Mapping[str, str],
    absolute: Callable[[str], str],
) -> Any:
    """An evaluator's section with absolute paths.

    Its tokenizer is by default the base's, and its teachers are by default all experts.
    """
    update: dict[str, Any] = {}
    if getattr(spec, "data", None) is not None:
        # An expert's head has classes of its own, which the configuration of the expert names.
        headed = experts.get(getattr(spec, "head", None) or "", "")
        owner = headed if (Path(headed) / "config.json").is_file() else base
        update["data"] = resolve_data(spec.data, folder, owner, absolute)
    for key in ("include_path", "folder"):
        if getattr(spec, key, None) is not None:
            update[key] = str((folder / getattr(spec, key)).resolve())
    if hasattr(spec, "tokenizer"):
        update["tokenizer"] = base if spec.tokenizer is None else absolute(spec.tokenizer)
    if hasattr(spec, "teachers"):
        given = dict(experts) if spec.teachers is None else spec.teachers
        update["teachers"] = {
            domain: experts.get(path) or absolute(path) for domain, path in given.items()
        }
    return spec.model_copy(update=update)
