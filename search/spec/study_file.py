"""The study file: YAML -> validated, frozen, fully resolved :class:`StudySpec`.

Unknown keys are refused with the known ones listed; every error is one line that names the file,
the key, the value and what is allowed. Relative paths are relative to the study file. Nothing here
reads weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mergesearch.evaluators.data.labels import classes_of_checkpoint
from mergesearch.evaluators.spec.data import resolve_data
from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.locations import absolute_path, split_path
from mergesearch.merging.errors import did_you_mean
from mergesearch.merging.extensions.references import find, is_reference, located
from mergesearch.merging.foreign.nested import DEPTH
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import cut, name_shown, printable
from mergesearch.merging.foreign.yaml_text import parse_yaml
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
from mergesearch.spaces.section import SpaceSpec

#: Problems of one study that are listed.
MOST_PROBLEMS = 20


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in ``data``; the value is read as YAML, an index of a list is a number.

    Raises:
        InputError: If the text has no ``=`` or walks through something that is not a section.
    """
    key, separator, text = override.partition("=")
    where = f"--set {name_shown(override)}"
    if not separator or not key:
        raise InputError(f"{where}: expected KEY=VALUE, for example budget.trials=50")
    *parents, last = key.split(".")
    if len(parents) > DEPTH:
        raise InputError(f"{where}: expected at most {DEPTH} levels of nesting, received more")
    value = parse_yaml(text, where)
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list) and _is_index(part, node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if part in BARE and isinstance(node.get(part), str):
                # A bare name becomes a section: `strategy: cma_es` and `strategy.sigma=0.1`.
                node[part] = {BARE[part]: node[part]}
            node = node.setdefault(part, {})
        else:
            raise _no_section(where, parents[: depth + 1])
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and _is_index(last, node):
        node[int(last)] = value
    else:
        raise _no_section(where, parents)


def _is_index(text: str, values: Sequence[Any]) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) < len(values)


def _no_section(where: str, parents: Sequence[str]) -> InputError:
    key = name_shown(".".join(parents))
    return InputError(f"{where}: {key} is not a section of the study file")


def validate(data: Mapping[str, Any], where: str) -> StudySpec:
    """Validate a mapping; ``where`` names the file in errors.

    Raises:
        InputError: With a line for each problem.
    """
    refuse_old_names(data, where)
    try:
        spec = StudySpec.model_validate(data)
    except ValidationError as error:
        raise InputError(all_of(where, explain(error, StudySpec))) from None
    return spec


def all_of(where: str, problems: Sequence[str]) -> str:
    """A message with a line for each problem, twenty at most; ``where`` begins each."""
    shown = list(problems[:MOST_PROBLEMS])
    if len(problems) > MOST_PROBLEMS:
        shown.append(f"{len(problems) - MOST_PROBLEMS} more problems; mend those above first")
    return "\n".join(f"{where}: {problem}" for problem in shown)


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each problem of a pydantic error, unknown keys first.

    Each has the key, the value and what is allowed.
    """
    problems = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    return list(dict.fromkeys(_line(problem, model) for problem in problems))


def _line(problem: Any, model: type[BaseModel]) -> str:
    loc = problem["loc"]
    whole = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    if whole and len(loc) > 1 and isinstance(loc[-2], int):
        loc = loc[:-1]  # the tag of a union
    key = ".".join(name_shown(str(part)) for part in _path(loc))
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {did_you_mean(str(loc[-1]), known_keys(model, loc[:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: required key is missing"
    told = cut(printable(problem["msg"], keep="\n"))
    message = f"{key}: {told[0].lower()}{told[1:]}"
    # What is wrong with a whole section is said in the message; the section would hide it.
    return message if whole else f"{message}, received {shortened(problem['input'])}"


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
            for inner in models_in(outer.model_fields[part].annotation)
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


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models of the sections that a key of this annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Make local paths absolute.

    Names that are no local paths are left for the hub (``org/name@revision``).
    """

    def absolute(path: str) -> str:
        whole = absolute_path(path, folder)
        unchanged = whole == path
        return str(resolved(folder / path)) if unchanged and path.startswith(".") else whole

    base = None if spec.base is None else absolute(spec.base)
    experts = {name: absolute(path) for name, path in spec.experts.items()}
    whole = spec.model_copy(
        update={
            "base": base,
            "experts": experts,
            "special": located_special(spec.special, absolute),
            "operator": OperatorSection(
                name=spec.operator.name, **in_full(spec.operator.options, folder)
            ),
            "space": _resolve_space(spec.space, folder),
            "start": _resolve_start(spec.start, folder),
            "trackers": [_resolve_tracker(tracker, folder) for tracker in spec.trackers],
            "evaluators": [
                _resolve_evaluator(
                    e, folder, base, experts, absolute, own_heads=spec.special.heads == "own"
                )
                for e in spec.evaluators
            ],
        }
    )
    _check_code(whole)
    return _with_code(whole, folder)


def _resolve_space(spec: SpaceSpec, folder: Path) -> SpaceSpec:
    """The section with the folders of its items made absolute."""
    if spec.bits is None or spec.bits.calibration is None:
        return spec
    located = in_full({"calibration": spec.bits.calibration}, folder)
    return spec.model_copy(update={"bits": spec.bits.model_copy(update=located)})


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
        return str(resolved(here if here.exists() and not beside.exists() else beside))

    changed: dict[str, Any] = {}
    if start.run is not None:
        changed["run"] = found(start.run)
    for key in ("priors", "scores"):
        runs = getattr(start, key)
        if runs is not None:
            changed[key] = [found(run) for run in runs]
    return start.model_copy(update=changed)


def _resolve_tracker(tracker: TrackerSpec, folder: Path) -> TrackerSpec:
    """The tracker with its folder, which is relative to the study file."""
    if tracker.folder is None:
        return tracker
    return tracker.model_copy(update={"folder": str(resolved(folder / tracker.folder))})


def _has_config(path: str) -> bool:
    """Whether a local checkpoint, or its adapter's folder, has a configuration of a model."""
    parts = split_path(path)
    return (Path(path if parts is None else parts[1]) / "config.json").is_file()


def _with_classes(data: Any, spec: Any, experts: Mapping[str, str]) -> Any:
    """A section of data with the classes of each domain's expert, where each names its own."""
    if getattr(data, "classes", True) is not None or not data.domains:
        return data
    named = getattr(spec, "experts", None) or {}
    paths = {domain: experts.get(named.get(domain, domain), "") for domain in data.domains}
    classes = {
        domain: classes_of_checkpoint(path) if _has_config(path) else None
        for domain, path in paths.items()
    }
    return data.model_copy(update={"classes": classes}) if all(classes.values()) else data


def _resolve_evaluator(
    spec: Any,
    folder: Path,
    base: str | None,
    experts: Mapping[str, str],
    absolute: Callable[[str], str],
    *,
    own_heads: bool,
) -> Any:
    """An evaluator's section with absolute paths.

    Its tokenizer is by default the base's, and its teachers are by default all experts. Where
    experts keep their heads, the classes of each domain are those of its expert.
    """
    update: dict[str, Any] = {}
    if getattr(spec, "data", None) is not None:
        # An expert's head has classes of its own, which the configuration of the expert names.
        headed = experts.get(getattr(spec, "head", None) or "", "")
        owner = headed if _has_config(headed) else base
        update["data"] = resolve_data(spec.data, folder, owner, absolute)
        if own_heads and getattr(spec, "head", None) is None:
            update["data"] = _with_classes(update["data"], spec, experts)
    for key in ("include_path", "folder"):
        if getattr(spec, key, None) is not None:
            update[key] = str(resolved(folder / getattr(spec, key)))
    # Merges for each input read texts only where they answer by class prompts.
    if hasattr(spec, "tokenizer") and getattr(spec, "prompts", True) is not None:
        update["tokenizer"] = base if spec.tokenizer is None else absolute(spec.tokenizer)
    if hasattr(spec, "teachers"):
        given = dict(experts) if spec.teachers is None else spec.teachers
        update["teachers"] = {
            domain: experts.get(path) or absolute(path) for domain, path in given.items()
        }
    return spec.model_copy(update=update)
