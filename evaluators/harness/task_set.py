"""The tasks of a study on every split, and the metrics that are measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import SPLITS, Split
from mergesearch.evaluators.harness.task_scores import is_mean
from mergesearch.evaluators.harness.tasks import (
    SplitTask,
    TaskOptions,
    check_metric,
    load_split,
    refuse_public,
)
from mergesearch.evaluators.objectives import Metric, additive_of, check_metrics
from mergesearch.merging import InputError


class TaskSet:
    """Tasks and metrics that are loaded and checked when they are first asked for.

    Args:
        options: The tasks as the study names them.
        metrics: Objectives and bounds; ``metric`` "" means every task's default.
        include_path: Folder of more task files.
        allow_public: Allow public benchmarks as targets of the search.
        where: Key of the study file, for messages.
    """

    def __init__(
        self,
        options: Sequence[TaskOptions],
        metrics: Sequence[Metric],
        *,
        include_path: str | None,
        allow_public: bool,
        where: str,
    ) -> None:
        self.options = tuple(options)
        self._stated = tuple(metrics)
        self._include_path = include_path
        self._allow_public = allow_public
        self._where = where

    @cached_property
    def by_split(self) -> dict[Split, list[SplitTask]]:
        """Every task on every split.

        Raises:
            InputError: If a task cannot be loaded, is a public benchmark, or occurs twice.
        """
        keys = [f"{self._where}.tasks.{index}" for index in range(len(self.options))]
        named = list(zip(self.options, keys, strict=True))
        for options, key in named:
            if not self._allow_public:
                refuse_public(options, self._include_path, key)
        tasks = {
            split: [
                task
                for options, key in named
                for task in load_split(options, self._include_path, split, key)
            ]
            for split in SPLITS
        }
        names = [task.name for task in tasks["search"]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{self._where}.tasks: expected each task once, received {twice[0]!r} twice; give "
                "one a name"
            )
        return tasks

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Objectives and bounds with the metric and direction that their tasks declare.

        Raises:
            InputError: If a metric does not fit its tasks.
        """
        tasks = {task.name: task for task in self.by_split["search"]}
        key = f"{self._where}.objectives"
        resolved = tuple(_resolved(metric, tasks, key) for metric in self._stated)
        check_metrics(resolved, self._where, by_domain=True)
        return resolved

    @property
    def names(self) -> list[str]:
        """Names of the tasks, which are the domains."""
        return [task.name for task in self.by_split["search"]]

    @cached_property
    def additive(self) -> tuple[str, ...]:
        """Objectives that are means of metrics that are means over documents."""
        plain = {
            metric.label
            for metric in self.metrics
            if all(is_mean(task, name) for task, name in self.measured_by(metric))
        }
        return tuple(name for name in additive_of(self.metrics) if name in plain)

    def measured_by(self, metric: Metric) -> list[tuple[SplitTask, str]]:
        """The tasks that a metric is measured on, and its name in each of them."""
        return [
            (task, task.metric if metric.metric == "score" else metric.metric)
            for task in self.by_split["search"]
            if metric.domains is None or task.name in metric.domains
        ]

    def document_domains(self, split: Split) -> npt.NDArray[np.str_]:
        """Task of every document of a split ``(all,)``, whether it is used or not."""
        return np.array([task.name for task in self.by_split[split] for _ in task.document_indices])


def _resolved(metric: Metric, tasks: dict[str, SplitTask], where: str) -> Metric:
    """A metric with the name and direction that its tasks agree on."""
    odd = sorted(set(metric.domains or ()) - tasks.keys())
    if odd:
        raise InputError(
            f"{where}: expected domains among the tasks {sorted(tasks)}, received {odd[0]!r}"
        )
    chosen = [tasks[name] for name in metric.domains or tasks]
    for task in chosen:
        check_metric(task, metric.metric or task.metric, where)
    names = {metric.metric or task.metric for task in chosen}
    by_task = {task.name: task.direction(metric.metric or task.metric) for task in chosen}
    directions = set(by_task.values())
    if len(directions) > 1 and metric.direction is None:
        raise InputError(
            f"{where}: expected tasks that are all maximised or all minimised, received {by_task}; "
            "state them apart"
        )
    direction = metric.direction or directions.pop()
    name = names.pop() if len(names) == 1 else "score"
    return replace(metric, metric=name, direction=direction)
