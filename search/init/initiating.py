"""From models and data to a study that passes its check: inspect, draft, time, size, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import resolved
from mergesearch.search.init.commented import Key, commented, plain
from mergesearch.search.init.given import Request, as_name
from mergesearch.search.init.harness_tasks import Tasks, is_task, read_tasks
from mergesearch.search.init.models import TOKENIZERS, Models, folder_with, open_models
from mergesearch.search.init.proposal import propose
from mergesearch.search.init.proposed import Proposal
from mergesearch.search.init.roles import check_given
from mergesearch.search.init.sections import evaluator_sections, task_section
from mergesearch.search.init.sizing import TRIALS_FOR_AUTO, Size, size_of
from mergesearch.search.init.study import (
    budget_key,
    model_keys,
    operator_key,
    space_key,
    strategy_key,
    workers_key,
)
from mergesearch.search.init.tables import DataFile, read_data
from mergesearch.search.init.tasks import task_of
from mergesearch.search.plan.card_check import check_cards
from mergesearch.search.plan.loading import checked_study
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.cost.trial_cost import Cost, measure_cost
from mergesearch.search.spec.sections import study_schema
from mergesearch.search.spec.study_file import resolve

#: The schema that editors check the study with, beside it.
SCHEMA = "study.schema.json"
TITLE = "mergesearch study"
#: Letters of a name that is made of those of the data.
LONGEST_NAME = 60
#: Share of the time that measuring operators may take.
SHARE_OF_OPERATORS = 0.25


@dataclass(frozen=True, eq=False)
class Initiated:
    """A study that was written.

    Attributes:
        out: The study file.
        schema: The schema beside it.
        models: What was found out about the models.
        data: And about the data.
        tasks: Tasks of lm_eval.
        cost: Of a trial, or why it was not timed.
        size: Of the study.
        plan: The checked study.
    """

    out: Path
    schema: Path
    models: Models
    data: tuple[DataFile, ...]
    tasks: tuple[str, ...]
    cost: Cost | str
    size: Size
    plan: Plan


def init_study(request: Request, say: Callable[[str], None] = lambda _: None) -> Initiated:
    """Inspect models and data, and write a commented study that passes its check.

    Nothing is written unless all of it can be.

    Args:
        request: What is asked for.
        say: Told what is being done.

    Raises:
        InputError: In one line, if something is missing that cannot be seen.
    """
    check_free(request)
    say("looking at the models")
    draft, data = _drafted(request)
    plan = _first_plan(draft)
    say("timing the base and a merge; --no-measure leaves that out")
    cost = measure_cost(plan, draft.folder) if request.measure else "not asked for"
    size = size_of(plan, cost if isinstance(cost, Cost) else None, request.minutes)
    keys = draft.keys(_sized(draft, size), size)
    plan = planned(keys, draft.folder, str(request.out))
    check_cards(plan)
    schema = _write(request, keys)
    names = draft.tasks.names
    return Initiated(request.out, schema, draft.models, tuple(data), names, cost, size, plan)


def evaluators_for(request: Request) -> list[dict[str, Any]]:
    """The evaluators of a study of models and data, as plain data; nothing is written.

    Raises:
        InputError: In one line, if something is missing that cannot be seen.
    """
    draft, _ = _drafted(request)
    return [plain(section) for section in draft.evaluators(None)]


def _drafted(request: Request) -> tuple[_Draft, list[DataFile]]:
    """What models and data say, whatever the size of the study."""
    folder = resolved(request.out).parent
    models = open_models(request.models, request.base)
    task = task_of(_config(models), models.experts[0].path)
    tasks = read_tasks([one for one in request.data if is_task(one, task.name)])
    data = [
        file
        for one in request.data
        if not is_task(one, task.name)
        for file in read_data(one.value, one.name)
    ]
    _check_names(data)
    check_given(request.columns, data)
    proposals = [propose(d, task, models, request.columns, request.classes) for d in data]
    return _Draft(request, models, tuple(proposals), tasks, folder), data


@dataclass(frozen=True, eq=False)
class _Draft:
    """What does not depend on the size of a study."""

    request: Request
    models: Models
    proposals: tuple[Proposal, ...]
    tasks: Tasks
    folder: Path

    @property
    def name(self) -> str:
        """Name of the study."""
        given = self.request.name
        names = [*(proposal.data.name for proposal in self.proposals), *self.tasks.names]
        return as_name("-".join(names)[:LONGEST_NAME]) if given is None else given

    def evaluators(self, max_items: int | None) -> list[tuple[Key, ...]]:
        """The section of evaluators."""
        sections = evaluator_sections(self.proposals, self.models, self.folder, max_items)
        if self.tasks.names:
            tokenizer = folder_with(self.models, TOKENIZERS)
            sections.append(task_section(self.tasks, tokenizer, self.folder, max_items))
        return sections

    def plan(self, operator: object, size: Size | None = None) -> Plan:
        """The plan of a study of some size, by default of a small one."""
        keys = [
            *self._first(),
            Key("operator", operator),
            Key("space", {"granularity": "task" if size is None else size.granularity}),
            Key("evaluators", self.evaluators(None if size is None else size.max_items)),
            Key("budget", {"trials": 1000 if size is None else size.trials}),
            *self._workers(),
        ]
        return planned(keys, self.folder, str(self.request.out))

    def keys(self, plan: Plan, size: Size) -> list[Key]:
        """All keys of the study in the order of the file."""
        minutes = round(SHARE_OF_OPERATORS * self.request.minutes, 2)
        why = "What a good merge is."
        return [
            *self._first(),
            operator_key(plan, minutes),
            space_key(plan, size),
            strategy_key(plan),
            Key("evaluators", self.evaluators(size.max_items), why),
            budget_key(size, self.request.out),
            *self._workers(),
        ]

    def _first(self) -> list[Key]:
        why = f"The run folder is runs/{self.name}."
        return [Key("name", self.name, why), *model_keys(self.models, self.folder)]

    def _workers(self) -> list[Key]:
        key = workers_key(self.models)
        return [] if key is None else [key]


def _config(models: Models) -> dict[str, object]:
    """The configuration that says what the models do: an expert's, else the base's."""
    named = [m.config for m in (*models.experts, models.base) if m.config.get("architectures")]
    return dict(named[0]) if named else {}


def _first_plan(draft: _Draft) -> Plan:
    """A draft's plan, by which everything but its size is checked.

    Raises:
        InputError: If something of it cannot be.
    """
    try:
        return draft.plan(operator="task_arithmetic")
    except InputError as error:
        if not draft.tasks.names or draft.tasks.folder is not None:
            raise
        raise InputError(
            f"--data {', '.join(draft.tasks.names)}: no file or folder has such a name, and as a "
            f"task of lm_eval: {error}"
        ) from None


def _check_names(data: Sequence[DataFile]) -> None:
    names = [file.name for file in data]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"--data: expected data of different names, received {twice!r} twice; name them, such "
            f"as --data first={data[names.index(twice)].given}"
        )


def _sized(draft: _Draft, size: Size) -> Plan:
    """The study with the operator that its size and models allow.

    Raises:
        InputError: If it does not pass its check with any.
    """
    if len(draft.models.experts) == 1:
        return draft.plan("task_arithmetic", size)
    minutes = round(SHARE_OF_OPERATORS * draft.request.minutes, 2)
    if size.trials >= TRIALS_FOR_AUTO and minutes > 0:
        try:
            return draft.plan({"name": "auto", "minutes": minutes}, size)
        except InputError:
            pass  # An operator that is named may do where none can be chosen by measuring.
    return draft.plan("ties", size)


def planned(keys: Sequence[Key], folder: Path, where: str) -> Plan:
    """The checked plan of a study that lies in a folder.

    Raises:
        InputError: In one line, if it does not pass.
    """
    return plan_study(resolve(checked_study(plain(keys), where), folder))


def check_free(request: Request) -> None:
    """Refuse to replace files, and folders that are not there, before anything is inspected.

    Raises:
        InputError: In one line.
    """
    if not request.data:
        raise InputError(
            "--data: expected at least one file, folder or task of lm_eval to score merges on, "
            "received none; add --data FILE"
        )
    if request.minutes <= 0:
        raise InputError(f"--minutes: expected more than 0, received {request.minutes:g}")
    folder = resolved(request.out).parent
    if not folder.is_dir():
        raise InputError(f"--out {request.out}: expected a folder, found no {folder}; create it")
    if request.out.is_dir():
        raise InputError(f"--out {request.out}: expected a file, received a folder")
    if request.out.exists() and not request.overwrite:
        raise InputError(
            f"--out {request.out}: expected a new file, found one; choose another, or add "
            "--overwrite"
        )
    schema = folder / SCHEMA
    if schema.exists() and not request.overwrite and not _is_schema(schema):
        raise InputError(
            f"--out {request.out}: expected {schema} to be free for the schema, found another "
            "file; move it, or add --overwrite"
        )


def _is_schema(path: Path) -> bool:
    """Whether a file is a schema that an earlier call wrote."""
    try:
        return bool(Node(read_json(path), str(path)).get("title").value == TITLE)
    except InputError:
        return False


def _write(request: Request, keys: Sequence[Key]) -> Path:
    """Write the schema, then the study.

    Raises:
        InputError: If the folder cannot be written to.
    """
    first = f"# yaml-language-server: $schema={SCHEMA}\n"
    about = (
        "# Written by `mergesearch init`: a comment says why each key is as it is.\n"
        "# `mergesearch help` explains all keys.\n"
    )
    text = first + about + commented(keys)
    assert yaml.safe_load(text) == json.loads(json.dumps(plain(keys)))
    schema = resolved(request.out).parent / SCHEMA
    fresh = not schema.exists()
    try:
        write_atomically(schema, json.dumps(study_schema(), indent=1))
        write_atomically(resolved(request.out), text)
    except OSError as error:
        if fresh:
            schema.unlink(missing_ok=True)
        raise InputError(
            f"--out {request.out}: expected a folder that can be written to, received: "
            f"{error.strerror or error}"
        ) from None
    return request.out.parent / SCHEMA
