"""Tasks of the language-model evaluation harness, and which of their documents a split holds.

Tasks are loaded once per process and kept. A task's documents are divided by a hash of their
content, so that a document is in the same split whatever task or order it comes from; or they are
the splits of its dataset, or listed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from mergesearch.evaluators.base import SPLITS, Split
from mergesearch.evaluators.harness.task_files import task_files
from mergesearch.evaluators.harness.templates import sandbox_templates
from mergesearch.evaluators.objectives import Direction
from mergesearch.merging import InputError
from mergesearch.merging.foreign.library import reason

#: Beginnings of the names of public benchmarks that people report results on.
PUBLIC = (
    "agieval", "arc_", "bbh", "belebele", "boolq", "ceval", "cmmlu", "copa", "drop", "global_mmlu",
    "gpqa", "gsm8k", "hellaswag", "hendrycks_math", "humaneval", "ifeval", "lambada",
    "leaderboard_", "mbpp", "medqa", "mgsm", "minerva_math", "mmlu", "musr", "openbookqa", "piqa",
    "race", "sciq", "siqa", "social_iqa", "squad", "superglue", "super-glue", "triviaqa",
    "truthfulqa", "winogrande", "xcopa", "xnli", "xstorycloze", "xwinograd",
)  # fmt: skip


@dataclass(frozen=True)
class TaskOptions:
    """One task as the study names it.

    Attributes:
        task: Name of a task or group, or one for each split.
        name: Name of the domain; by default the task's own name.
        metric: Default metric; None takes the task's first.
        filter: Which of its filters; None takes its only one.
        num_fewshot, fewshot_seed: Number of examples before the question, and seed of their choice.
        gen_kwargs: Changes to the task's own generation arguments.
        splits: Split -> split of the task's dataset; None takes the documents that the harness
            evaluates.
        samples: Split -> indices among those documents.
        divide: Shares of the three splits where neither is given.
        limit: Documents of a split at most.
        tier: ``one`` for frozen requests, ``two`` for the harness's own loop, ``auto`` for one
            where that is possible.
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
        name: Name of its domain.
        task: The harness's task object.
        document_indices: Documents of the split, by index among those that the object evaluates,
            rising ``(documents,)``.
        ids: Hash of each of them.
        metric: Default metric.
        filter: Which filter's answers are measured.
        options: What the study says of it.
    """

    name: str
    task: Any
    document_indices: tuple[int, ...]
    ids: tuple[str, ...]
    metric: str
    filter: str
    options: TaskOptions

    def direction(self, metric: str) -> Direction:
        """Direction in which a metric is optimised, as the task declares it."""
        return "maximize" if self.task.higher_is_better()[metric] else "minimize"


def load_split(
    options: TaskOptions, include: str | None, split: Split, where: str
) -> list[SplitTask]:
    """Load a task, or the tasks of a group, on a split.

    Raises:
        InputError: If the harness cannot load it, or the split is empty.
    """
    named = options.task if isinstance(options.task, str) else options.task[split]
    changes: dict[str, Any] = {}
    if options.splits is not None:
        changes = {"test_split": options.splits[split]}
    if options.num_fewshot is not None:
        changes["num_fewshot"] = options.num_fewshot
    generation = json.dumps(dict(options.gen_kwargs))
    tasks = []
    for task in _load(named, include, json.dumps(changes, sort_keys=True), generation, where):
        task.set_fewshot_seed(seed=options.fewshot_seed)
        name = task.task_name if isinstance(options.task, str) else options.task["search"]
        metric = _metric(task, options.metric, where)
        chosen = _filter(task, options.filter, where)
        indices, ids = _documents(task, options, split, where)
        tasks.append(SplitTask(options.name or name, task, indices, ids, metric, chosen, options))
    if options.name is not None and len(tasks) > 1:
        raise InputError(
            f"{where}.name: expected none for group {named!r}, whose tasks have names, received a "
            "name"
        )
    return tasks


def check_metric(task: SplitTask, metric: str, where: str) -> None:
    """Refuse a metric that a task does not have.

    Raises:
        InputError: Listing those that it has.
    """
    _metric(task.task, metric, where)


def refuse_public(options: TaskOptions, include: str | None, where: str) -> None:
    """Refuse to search on public benchmarks, on which results are reported.

    Tasks in the user's own folder are not public, whatever their names.

    Raises:
        InputError: If the name is that of a public benchmark, and the search does not use its
            training split.
    """
    named = options.task if isinstance(options.task, str) else options.task["search"]
    trained = (options.splits or {}).get("search", "").startswith("train")
    own = include is not None and named in _manager(include, False).task_index
    if named.lower().startswith(PUBLIC) and not trained and not own:
        raise InputError(
            f"{where}: expected no public benchmark as a target of the search, received {named!r}: "
            "a merge that was searched on it says nothing there; search on its training split "
            "(splits: {search: train, ...}) or on tasks of your own, or set "
            "allow_public_benchmarks: true"
        )


def check_disjoint(tasks: Mapping[Split, Sequence[SplitTask]], where: str) -> None:
    """Refuse tasks if two splits share documents, whatever tasks these are in.

    Raises:
        InputError: Naming the tasks.
    """
    ids = {split: {i: task.name for task in tasks[split] for i in task.ids} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        shared = sorted(ids[one].keys() & ids[other].keys())
        if shared:
            raise InputError(
                f"{where}.tasks: expected disjoint splits, received {len(shared)} documents in "
                f"both {one} and {other}, for example one of {ids[one][shared[0]]!r} and "
                f"{ids[other][shared[0]]!r}; leave splits and samples out, to divide documents by "
                "what they say"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's progress bars and logs; errors still raise."""
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

    sandbox_templates()
    with quiet():
        return TaskManager(include_path=include, include_defaults=defaults)


@cache
def _load(
    named: str, include: str | None, changes: str, generation: str, where: str
) -> tuple[Any, ...]:
    """Load the task objects of a task or group.

    The index of all tasks that come with the harness is read only if the name is not in the user's
    own folder.
    """
    if include is not None:
        for _ in task_files(Path(include), where):
            pass  # those that the harness would silently ignore are refused
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
        raise InputError(
            f"{where}.task: {named}: expected a task that loads, received {reason(error)}"
        ) from None
    for task in tasks["tasks"].values():
        for key, value in json.loads(changes).items() if grouped else ():
            task.set_config(key=key, value=value)
        if json.loads(generation):
            task.set_config(key="generation_kwargs", value=json.loads(generation), update=True)
    return tuple(tasks["tasks"].values())


def _metric(task: Any, wanted: str | None, where: str) -> str:
    """The metric of that name, or the task's first."""
    known = list(task.higher_is_better())
    if wanted is None:
        return str(known[0])
    if wanted not in known:
        raise InputError(
            f"{where}.metric: {task.task_name}: expected one of {known}, received {wanted!r}"
        )
    return wanted


def _filter(task: Any, wanted: str | None, where: str) -> str:
    """The filter of that name, or the task's only one."""
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
    """Indices and hashes of a split's documents."""
    ids = _hashes(task)
    if options.samples is not None:
        indices = sorted(set(options.samples[split]))
        if indices and not 0 <= indices[0] <= indices[-1] < len(ids):
            raise InputError(
                f"{where}.samples.{split}: expected indices from 0 to {len(ids) - 1}, received "
                f"{indices[0]} to {indices[-1]}"
            )
    elif options.splits is not None or not isinstance(options.task, str):
        indices = list(range(len(ids)))
    else:
        indices = [i for i, name in enumerate(ids) if _split_of(name, options.divide) == split]
    limit = options.limit.get(split) if isinstance(options.limit, Mapping) else options.limit
    used = tuple(indices[:limit])
    if not used:
        raise InputError(
            f"{where}: {task.task_name}: expected documents in the {split} split, received none of "
            f"{len(ids)}; give splits, samples or other shares"
        )
    return used, tuple(ids[index] for index in used)


@cache
def _hashes(task: Any) -> tuple[str, ...]:
    """Hash of the content of each document."""
    return tuple(
        hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for _, doc in task.doc_iterator()
    )


def _split_of(name: str, shares: tuple[float, float, float]) -> Split:
    """The split of a document, by its hash."""
    position = int(name[:8], 16) / 2**32 * sum(shares)
    if position < shares[0]:
        return SPLITS[0]
    return SPLITS[1] if position < shares[0] + shares[1] else SPLITS[2]
