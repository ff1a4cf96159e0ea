"""The study file: YAML -> validated, frozen, fully resolved :class:`StudySpec`.

Unknown keys are refused with the known ones listed; every error is one line that names the file, the key, the
value and what is allowed. Relative paths are relative to the study file. Nothing here reads weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evaluators.spec import EvaluatorSpec
from merging import InputError
from merging.calibration import absolute as in_full
from merging.checkpoint import absolute_path
from merging.special import Special, located_special
from search.trackers.spec import TrackerSpec
from spaces.spec import SpaceSpec


class Section(BaseModel):
    """A section of the study file: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OperatorSection(BaseModel):
    """``operator: task_arithmetic`` or ``operator: {name: ..., hyperparameter: ...}``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "task_arithmetic"

    @property
    def options(self) -> dict[str, Any]:
        """Hyperparameters."""
        return dict(self.__pydantic_extra__ or {})


class StrategySection(BaseModel):
    """``strategy: cma_es`` or ``strategy: {name: ..., option: ...}``; ``auto`` chooses by dimensions and objectives."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's options."""
        return dict(self.__pydantic_extra__ or {})


class BudgetSection(Section):
    """How much to spend."""

    trials: int | None = Field(
        None, ge=1, description="trials in total: anchors, search, recommendation; failures count, validation does not"
    )
    evaluations: int | None = Field(None, ge=1, description="evaluations of items, over all trials")
    seconds: float | None = Field(None, gt=0, description="wall time in which trials run, over all sessions")
    worker_hours: float | None = Field(None, gt=0, description="time of all workers on trials, in hours")

    @model_validator(mode="after")
    def _limited(self) -> BudgetSection:
        if all(getattr(self, key) is None for key in type(self).model_fields):
            raise ValueError(f"expected at least one of {', '.join(type(self).model_fields)}")
        return self


class StartSection(Section):
    """Begin at what another run found, in its space or a finer one."""

    run: str = Field(description="folder of a run on the same experts")
    trial: int | None = Field(None, ge=0, description="number of its trial; default its winner")


class FidelitySection(Section):
    """On how many of the search items a trial is evaluated, and what ends it early."""

    rule: Literal["full", "race", "halving", "hyperband", "subset"] = Field(
        "full",
        description="full: all items; race: until clearly worse than a leading trial; halving, hyperband: while among "
        "the best 1/eta; subset: so many items, all where they look better than the leading trial",
    )
    min_items: int = Field(50, ge=2, description="items before the first look; for subset, all that most trials get")
    confidence: float = Field(1.0, gt=0, description="race: standard errors of the paired difference that count")
    eta: int = Field(3, ge=2, description="halving, hyperband: factor between stages, one of so many goes on")
    order: Literal["balanced", "anchors"] = Field(
        "balanced", description="subset: the first of the fixed order, or items that stand for others, by the anchors"
    )
    estimate: Literal["difference", "mean", "anchors", "p_irt", "mp_irt", "gp_irt", "gmp_irt"] = Field(
        "difference", description="what the strategy is told of a stopped trial, an estimate of its score on all items"
    )


class SelectionSection(Section):
    """How the winner is chosen from the trials, on validation items."""

    leaders: int = Field(5, ge=1, description="how many of the best trials are re-evaluated on validation items")
    confidence: float = Field(
        1.0, ge=0, description="leaders are nominated by their value less so many standard errors"
    )
    repeats: int = Field(
        1, ge=0, description="evaluations of the winner on the search items again, to see how far scores move"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="relative importance of the objectives; default equal"
    )


def _whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("expected a share of one GPU, or whole ones")
    return gpus


class WorkersSection(Section):
    """Who does the work. Changing it does not change what is searched."""

    backend: Literal["auto", "inline", "ray"] = Field(
        "auto", description="auto: ray where a count, GPUs or an address is given, else one worker in this process"
    )
    count: int | None = Field(
        None, ge=1, description="workers; default: as many as fit, more or fewer as nodes of a cluster join and leave"
    )
    cpus: float = Field(1, gt=0, description="CPUs of each worker")
    gpus: Annotated[float, AfterValidator(_whole)] = Field(
        0, ge=0, description="GPUs of each worker; 1 puts one worker on each, more spread its model"
    )
    threads: int = Field(1, ge=1, description="threads of each worker for merging and evaluation on CPU")
    address: str | None = Field(
        None, description="address of a running Ray cluster, auto on one of its nodes; default: a local one"
    )
    cache: str | None = Field(
        None,
        description="folder on every node for prepared weights; default: beside the run, on clusters below the "
        "node's folder for temporary files",
    )

    @property
    def distributed(self) -> bool:
        """Whether Ray runs the workers."""
        given = self.count is not None or self.gpus > 0 or self.address is not None
        return self.backend == "ray" or (self.backend == "auto" and given)


class DriverSection(Section):
    """How the driver behaves when something goes wrong. Changing it does not change what is searched."""

    drain_seconds: float = Field(
        30, ge=0, description="after Ctrl-C or SIGTERM, how long trials that run may take to finish"
    )
    patience_seconds: float = Field(
        300, ge=0, description="how long to wait for a storage, a disk or workers that are away before giving up"
    )
    lease_seconds: float = Field(
        60, ge=1, description="silence after which another driver may take over a study in a database"
    )


def _named(value: Any) -> Any:
    """Allow a bare name where a section has one: ``strategy: cma_es``."""
    return {"name": value} if isinstance(value, str) else value


def _ruled(value: Any) -> Any:
    """Allow a bare rule: ``fidelity: race``."""
    return {"rule": value} if isinstance(value, str) else value


def _experts(value: Any) -> Any:
    """Allow a list of paths: names are the folder names."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    named = {Path(str(path)).name: str(path) for path in value}
    if len(named) < len(value):
        raise ValueError("expected experts in folders of different names, or a mapping of name to path")
    return named


class StudySpec(Section):
    """A whole study, resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder")
    seed: int = Field(0, ge=0)
    base: str | None = Field(None, description="folder, .safetensors file or org/name@revision of the common base")
    experts: Annotated[dict[str, str], BeforeValidator(_experts)] = Field(
        default_factory=dict, description="name -> checkpoint of each expert"
    )
    operator: Annotated[OperatorSection, BeforeValidator(_named)] = OperatorSection()
    special: Special = Field(Special(), description="policies for vocabularies, running statistics, new heads, ties")
    space: SpaceSpec = SpaceSpec()
    strategy: Annotated[StrategySection, BeforeValidator(_named)] = StrategySection()
    evaluators: list[EvaluatorSpec] = Field(min_length=1)
    budget: BudgetSection
    start: StartSection | None = Field(None, description="another run whose winner is the place to begin")
    anchors: Literal["default", "none"] = "default"
    fidelity: Annotated[FidelitySection, BeforeValidator(_ruled)] = FidelitySection()
    selection: SelectionSection = SelectionSection()
    allow_code: bool = Field(
        False, description="let evaluators run code that this file names: scorers, commands, tasks"
    )
    reference_scores: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="what is known of base and experts: anchor -> objective -> value; differences are warned of",
    )
    workers: WorkersSection = WorkersSection()
    driver: DriverSection = DriverSection()
    trackers: list[TrackerSpec] = Field(default_factory=list, description="experiment trackers that follow the study")
    storage: str | None = Field(
        None, description="a database's URL, ${NAME} is read from the environment; default: a journal in the run folder"
    )
    max_consecutive_failures: int = Field(10, ge=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form with every default filled in."""
        return self.model_dump(mode="json")


#: Sections that may be a bare name, and the key that it stands for.
BARE = {"operator": "name", "strategy": "name", "fidelity": "rule"}
#: Keys that may differ when a run is resumed: they say who does the work, not what is searched.
EXECUTION_KEYS = ("workers", "driver", "trackers", "max_consecutive_failures")


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read, override (``a.b=c``), validate and resolve a study file.

    Raises:
        InputError: In one line, if anything is wrong with it.
    """
    try:
        text = path.read_text()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: expected a study file, received: {reason}; see `mergesearch run --help`") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, received: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys, received {type(data).__name__}")
    for override in overrides:
        apply_override(data, override)
    return resolve(validate(data, str(path)), path.resolve().parent)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in ``data``; the value is read as YAML, list places are numbers.

    Raises:
        InputError: If the text has no ``=`` or walks through something that is not a section.
    """
    key, found, text = override.partition("=")
    if not found or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE, for example budget.trials=50")
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if part in BARE and isinstance(node.get(part), str):
                # A bare name opened up: `strategy: cma_es` and `strategy.sigma=0.1`.
                node[part] = {BARE[part]: node[part]}
            node = node.setdefault(part, {})
        else:
            raise InputError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section of the study file")
    value = yaml.safe_load(text)
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise InputError(f"--set {override}: {'.'.join(parents)} is not a section of the study file")


def validate(data: Mapping[str, Any], where: str) -> StudySpec:
    """Validate a mapping; ``where`` names the file in errors.

    Raises:
        InputError: One line for the first problem, and how many more there are.
    """
    try:
        spec = StudySpec.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, StudySpec)}") from None
    _check_names(spec, where)
    return spec


def _check_names(spec: StudySpec, where: str) -> None:
    """Checks across sections that need no file: operator, strategy, sources."""
    from merging.operators import get_operator
    from search.strategies import check_options

    try:
        get_operator(spec.operator.name).complete(spec.operator.options)
        check_options(spec.strategy.name, spec.strategy.options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    _check_storage(spec.storage, where)
    if spec.special.vocabulary == "common":
        raise InputError(
            f"{where}: special.vocabulary: expected same, base or union in a study, whose items hold the base's token "
            "numbers, received common, which renumbers them"
        )
    if (spec.base is None) != (not spec.experts):
        missing = "base" if spec.base is None else "experts"
        raise InputError(f"{where}: {missing}: expected both base and experts (or neither, for analytic problems)")


def _check_storage(url: str | None, where: str) -> None:
    """Refuse a password in plain text: the study is copied to the run folder, the database and the cluster."""
    if url is None:
        return
    from urllib.parse import urlsplit

    from search.redact import redact
    from search.storage import database_url

    password = urlsplit(url).password
    if password and "${" not in password:
        raise InputError(
            f"{where}: storage: expected the password as ${{NAME}}, to be read from the environment, received it in "
            f"plain text in {redact(url)}; or leave it to PGPASSWORD or ~/.pgpass"
        )
    try:
        database_url(url)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, received {_short(first['input'])}{more}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(loc: Sequence[int | str]) -> Iterator[int | str]:
    """Location without the tags that pydantic inserts for unions (``evaluators.0.synthetic.problem``)."""
    for place, part in enumerate(loc):
        tag = place > 0 and isinstance(loc[place - 1], int) and isinstance(part, str) and place + 1 < len(loc)
        if not tag:
            yield part


def known_keys(model: type[BaseModel], loc: Sequence[int | str]) -> set[str]:
    """Keys of the section at ``loc``, found by walking the models."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        found = [
            inner
            for outer in models
            if part in outer.model_fields
            for inner in _models_in(outer.model_fields[part].annotation)
        ]
        # A union tag is the value of a discriminator (`kind`), not a field name.
        tagged = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
        models = found or tagged or models
    return {name for outer in models for name in outer.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Make local paths absolute; a name that is no local path is left for the hub (``org/name@revision``)."""

    def absolute(path: str) -> str:
        found = absolute_path(path, folder)
        return str((folder / path).resolve()) if found == path and path.startswith(".") else found

    base = None if spec.base is None else absolute(spec.base)
    experts = {name: absolute(path) for name, path in spec.experts.items()}
    resolved = spec.model_copy(
        update={
            "base": base,
            "experts": experts,
            "special": located_special(spec.special, absolute),
            "operator": OperatorSection(name=spec.operator.name, **in_full(spec.operator.options, folder)),
            "start": _resolve_start(spec.start, folder),
            "trackers": [_resolve_tracker(tracker, folder) for tracker in spec.trackers],
            "evaluators": [_resolve_evaluator(e, folder, base, experts, absolute) for e in spec.evaluators],
        }
    )
    _check_code(resolved)
    return resolved


def _check_code(spec: StudySpec) -> None:
    """Refuse evaluators that run code which the study names, unless it says so; before any of it could run."""
    for place, evaluator in enumerate(spec.evaluators):
        if getattr(evaluator, "runs_code", False) and not spec.allow_code:
            raise InputError(
                f"evaluators.{place}: {evaluator.kind} runs code that the study names; if you trust it, set "
                "allow_code: true at the top of the study file"
            )


def _resolve_start(start: StartSection | None, folder: Path) -> StartSection | None:
    """A run's folder: beside the study file or, as ``runs/`` is made where a command runs, in the current folder."""
    if start is None:
        return None
    beside, here = folder / start.run, Path(start.run)
    found = here if here.exists() and not beside.exists() else beside
    return start.model_copy(update={"run": str(found.resolve())})


def _resolve_tracker(tracker: TrackerSpec, folder: Path) -> TrackerSpec:
    """Its folder beside the study file."""
    found = tracker.folder
    return tracker if found is None else tracker.model_copy(update={"folder": str((folder / found).resolve())})


def _resolve_evaluator(
    spec: Any, folder: Path, base: str | None, experts: Mapping[str, str], absolute: Callable[[str], str]
) -> Any:
    """Evaluators read folders; their tokenizer is by default the base's, and experts that they ask by default all."""
    found: dict[str, Any] = {}
    for key in ("data", "include_path", "folder"):
        if getattr(spec, key, None) is not None:
            found[key] = str((folder / getattr(spec, key)).resolve())
    if hasattr(spec, "tokenizer"):
        found["tokenizer"] = base if spec.tokenizer is None else absolute(spec.tokenizer)
    if hasattr(spec, "teachers"):
        given = dict(experts) if spec.teachers is None else spec.teachers
        found["teachers"] = {domain: experts.get(path) or absolute(path) for domain, path in given.items()}
    return spec.model_copy(update=found)


def evaluation_digest(spec: StudySpec) -> str:
    """Hash of all that scores depend on beside the merge: evaluators, batch sizes, tasks, the harness's version.

    Scores of one recipe under two digests are not to be compared: batches of another size may round otherwise.
    """
    from importlib.metadata import version

    versions = {name: version(name) for name in ("lm-eval", "torch", "transformers")}
    content = {"evaluators": spec.to_dict()["evaluators"], "versions": versions}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys at which two resolved studies differ, as ``key: recorded -> given``, execution keys left out."""
    flat_ours, flat_theirs = dict(_flatten(ours)), dict(_flatten(theirs))
    keys = sorted(set(flat_ours) | set(flat_theirs))
    return [
        f"{key}: {_short(flat_ours.get(key))} -> {_short(flat_theirs.get(key))}"
        for key in keys
        if flat_ours.get(key) != flat_theirs.get(key) and key.split(".")[0] not in EXECUTION_KEYS
    ]


def listed(changed: Sequence[str]) -> str:
    """The first few of :func:`differences`, and how many more there are."""
    more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
    return "; ".join(changed[:4]) + more


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        for place, value in enumerate(node):
            yield from _flatten(value, f"{prefix}.{place}")
    else:
        yield prefix, node
