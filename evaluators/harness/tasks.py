"""Tasks of the language-model evaluation harness: which documents belong to which split, and what
is measured of them.

Tasks are loaded once per process and kept. A task's documents are divided by a hash of what they
say, so that a document is in the same split whatever task or order it comes from; or they are the
splits of its dataset, or listed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import SPLITS, Split
from mergesearch.evaluators.objectives import Direction
from mergesearch.merging import InputError

Array = npt.NDArray[np.float64]

#: Beginnings of the names of public benchmarks that people report results on.
PUBLIC = (
    "agieval", "arc_", "bbh", "belebele", "boolq", "ceval", "cmmlu", "copa", "drop", "global_mmlu",
    "gpqa", "gsm8k", "hellaswag", "hendrycks_math", "humaneval", "ifeval", "lambada",
    "leaderboard_", "mbpp", "medqa", "mgsm", "minerva_math", "mmlu", "musr", "openbookqa", "piqa",
    "race", "sciq", "siqa", "social_iqa", "squad", "superglue", "super-glue", "triviaqa",
    "truthfulqa", "winogrande", "xcopa", "xnli", "xstorycloze", "xwinograd",
)  # fmt: skip
#: Seed of the bootstrap behind the errors of values that are no means, and its number of samples.
BOOTSTRAP = (0, 100)


@dataclass(frozen=True)
class TaskOptions:
    """One task as the study names it.

    Attributes:
        task: Name of a task or group, or one for each split.
        name: What to call it, the domain; by default the task's own name.
        metric: Default metric; None: the task's first.
        filter: Which of its filters; None: its only one.
        num_fewshot, fewshot_seed: Examples before the question.
        gen_kwargs: Changes to the task's own generation arguments.
        splits: Split -> split of the task's dataset; None: the documents that the harness
            evaluates.
        samples: Split -> places among those documents.
        divide: Shares of the three splits where neither is given.
        limit: Documents of a split at most.
        tier: ``one``: frozen requests; ``two``: the harness's own loop; ``auto``: one where it can
            serve.
    """

    task: str | Mapping[Split, str]
    name: str | None = None
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[Split, str] | None = None
    samples: Mapping[Split, Sequence[int]] | None = None
    divide: tuple[float, float, float] = (0.6, 0.2, 0.2)
    limit: int | Mapping[Split, int] | None = None
    tier: Literal["auto", "one", "two"] = "auto"


@dataclass(frozen=True, eq=False)
class SplitTask:
    """A task on one split.

    Attributes:
        name: Its domain.
        task: The harness's object.
        places: Documents of the split, by place among those that the object evaluates, rising
            ``(documents,)``.
        ids: Hash of each of them.
        metric: Default metric.
        filter: Which filter's answers are measured.
        options: What the study says of it.
    """

    name: str
    task: Any
    places: tuple[int, ...]
    ids: tuple[str, ...]
    metric: str
    filter: str
    options: TaskOptions

    def direction(self, metric: str) -> Direction:
        """Where better is, as the task says."""
        return "maximize" if self.task.higher_is_better()[metric] else "minimize"


def load_split(
    options: TaskOptions, include: str | None, split: Split, where: str
) -> list[SplitTask]:
    """The task, or the tasks of the group, on a split.

    Raises:
        InputError: If the harness cannot load it, or the split is empty.
    """
    named = options.task if isinstance(options.task, str) else options.task[split]
    changes: dict[str, Any] = {}
    if options.splits is not None:
        changes = {"test_split": options.splits[split]}
    if options.num_fewshot is not None:
        changes["num_fewshot"] = options.num_fewshot
    found = []
    for task in _load(
        named,
        include,
        json.dumps(changes, sort_keys=True),
        json.dumps(dict(options.gen_kwargs)),
        where,
    ):
        task.set_fewshot_seed(seed=options.fewshot_seed)
        name = task.task_name if isinstance(options.task, str) else options.task["search"]
        metric = _metric(task, options.metric, where)
        chosen = _filter(task, options.filter, where)
        places, ids = _documents(task, options, split, where)
        found.append(SplitTask(options.name or name, task, places, ids, metric, chosen, options))
    if options.name is not None and len(found) > 1:
        raise InputError(
            f"{where}.name: expected none for group {named!r}, whose tasks have names, received a "
            "name"
        )
    return found


def check_metric(task: SplitTask, metric: str, where: str) -> None:
    """Refuse a metric that a task does not have.

    Raises:
        InputError: Listing those that it has.
    """
    _metric(task.task, metric, where)


def refuse_public(options: TaskOptions, include: str | None, where: str) -> None:
    """Refuse to search on what results are reported on; tasks of the user's own folder are taken
    for their own.

    Raises:
        InputError: If the name is that of a public benchmark, and its training items are not what
            is asked for.
    """
    named = options.task if isinstance(options.task, str) else options.task["search"]
    trained = (options.splits or {}).get("search", "").startswith("train")
    own = include is not None and named in _manager(include, False).task_index
    if named.lower().startswith(PUBLIC) and not trained and not own:
        raise InputError(
            f"{where}: expected no public benchmark as a target of the search, received {named!r}: "
            "a merge that was "
            "searched on it says nothing there; search on its training split (splits: {search: "
            "train, ...}) or on "
            "tasks of your own, or set allow_public_benchmarks: true"
        )


def check_disjoint(tasks: Mapping[Split, Sequence[SplitTask]], where: str) -> None:
    """Refuse documents that two splits share, whatever tasks they are in.

    Raises:
        InputError: Naming the tasks.
    """
    ids = {split: {i: task.name for task in tasks[split] for i in task.ids} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        shared = sorted(ids[one].keys() & ids[other].keys())
        if shared:
            raise InputError(
                f"{where}.tasks: expected disjoint splits, received {len(shared)} documents in "
                f"both {one} and {other}, "
                f"for example one of {ids[one][shared[0]]!r} and {ids[other][shared[0]]!r}; leave "
                "splits and samples "
                "out, to divide documents by what they say"
            )


def aggregate(task: Any, metric: str, values: Sequence[Any]) -> tuple[float, float, bool]:
    """A task's value from those of documents, its standard error, and whether it is their mean."""
    function: Callable[[Any], float] = task.aggregation()[metric]
    value = float(function(list(values)))
    if np.isscalar(values[0]) or isinstance(values[0], bool):
        plain = np.asarray(values, dtype=np.float64)
        if abs(plain.mean() - value) <= 1e-9 * max(1.0, abs(value)):
            return float(plain.mean()), float(plain.std() / np.sqrt(plain.size)), True
    seed, count = BOOTSTRAP
    rng = np.random.default_rng(seed)
    drawn = [
        function([values[i] for i in rng.integers(len(values), size=len(values))])
        for _ in range(count)
    ]
    return value, float(np.std(drawn)), False


def item_score(value: Any, task: SplitTask, metric: str, where: str) -> float:
    """A document's score, better where the metric is: a number, or log-likelihood per unit for
    perplexities.

    Raises:
        InputError: If the metric has no value for one document.
    """
    if isinstance(value, bool | int | float | np.number):
        # Log-likelihoods are better where they are high, perplexities where they are low.
        flipped = "perplexity" in metric and task.direction(metric) == "minimize"
        return -float(value) if flipped else float(value)
    if (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(part, int | float) for part in value)
    ):
        return -float(value[0]) / float(value[1])
    raise InputError(
        f"{where}: {task.name}: expected a metric with a score for every document, received "
        f"{metric!r}, which is made "
        f"of {type(value).__name__}; choose another"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's progress bars and logs of what it is doing; errors still raise."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(before)


@cache
def _manager(include: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=include, include_defaults=defaults)


@cache
def _load(
    named: str, include: str | None, changes: str, generation: str, where: str
) -> tuple[Any, ...]:
    """Task objects; the index of all tasks that come with the harness is read only if a name asks
    for it.
    """
    if include is not None:
        _check_yaml(Path(include), where)
    manager = _manager(include, False)
    if named not in manager.task_index:
        manager = _manager(include, True)
    if named not in manager.task_index:
        import difflib

        close = difflib.get_close_matches(named, list(manager.task_index), n=3)
        hint = f"; did you mean one of {close}?" if close else ""
        raise InputError(
            f"{where}.task: expected a task of lm_eval or of {include or 'include_path'}, received "
            f"{named!r}{hint}"
        )
    try:
        with quiet():
            # Changes reach a task that has a name only as a member of a group.
            grouped = named in (*manager.all_groups, *manager.all_tags)
            member = {"group": "mergesearch", "task": [{"task": named, **json.loads(changes)}]}
            tasks = manager.load([named if grouped else member])
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"{where}.task: {named}: expected a task that loads, received {type(error).__name__}: "
            f"{text[:300]}"
        ) from None
    for task in tasks["tasks"].values():
        for key, value in json.loads(changes).items() if grouped else ():
            task.set_config(key=key, value=value)
        if json.loads(generation):
            task.set_config(key="generation_kwargs", value=json.loads(generation), update=True)
    return tuple(tasks["tasks"].values())


def _check_yaml(include: Path, where: str) -> None:
    """Refuse files that the harness would silently leave out."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads tags such as ``!function`` as text."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)
    if not include.is_dir():
        raise InputError(
            f"{where}.include_path: expected a folder of task files, found no {include}"
        )
    for path in sorted(include.rglob("*.yaml")):
        try:
            yaml.load(path.read_text(), Loader)
        except yaml.YAMLError as error:
            raise InputError(
                f"{path}: expected YAML, received: {' '.join(str(error).split())}"
            ) from None


def names_code(include: Path) -> bool:
    """Whether task files of a folder name Python functions, which loading them runs."""
    return any("!function" in path.read_text(errors="replace") for path in include.rglob("*.yaml"))


def _metric(task: Any, wanted: str | None, where: str) -> str:
    known = list(task.higher_is_better())
    if wanted is None:
        return str(known[0])
    if wanted not in known:
        raise InputError(
            f"{where}.metric: {task.task_name}: expected one of {known}, received {wanted!r}"
        )
    return wanted


def _filter(task: Any, wanted: str | None, where: str) -> str:
    known = [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]
    if wanted is None and len(known) > 1:
        raise InputError(
            f"{where}.filter: required key is missing: {task.task_name} has {known}, which may "
            "score very differently"
        )
    if wanted is not None and wanted not in known:
        raise InputError(
            f"{where}.filter: {task.task_name}: expected one of {known}, received {wanted!r}"
        )
    return wanted or known[0]


def _documents(
    task: Any, options: TaskOptions, split: Split, where: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Places and hashes of a split's documents."""
    ids = _hashes(task)
    if options.samples is not None:
        places = sorted(set(options.samples[split]))
        if places and not 0 <= places[0] <= places[-1] < len(ids):
            raise InputError(
                f"{where}.samples.{split}: expected places from 0 to {len(ids) - 1}, received "
                f"{places[0]} to "
                f"{places[-1]}"
            )
    elif options.splits is not None or not isinstance(options.task, str):
        places = list(range(len(ids)))
    else:
        places = [
            place for place, name in enumerate(ids) if _belongs(name, options.divide) == split
        ]
    limit = options.limit.get(split) if isinstance(options.limit, Mapping) else options.limit
    kept = tuple(places[:limit])
    if not kept:
        raise InputError(
            f"{where}: {task.task_name}: expected documents in the {split} split, received none of "
            f"{len(ids)}; give "
            "splits, samples or other shares"
        )
    return kept, tuple(ids[place] for place in kept)


@cache
def _hashes(task: Any) -> tuple[str, ...]:
    return tuple(
        hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for _, doc in task.doc_iterator()
    )


def _belongs(name: str, shares: tuple[float, float, float]) -> Split:
    """The split of a document, by its hash."""
    place = int(name[:8], 16) / 2**32 * sum(shares)
    return (
        SPLITS[0]
        if place < shares[0]
        else SPLITS[1]
        if place < shares[0] + shares[1]
        else SPLITS[2]
    )
