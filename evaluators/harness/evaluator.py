"""Tasks of the language-model evaluation harness on the resident model, without the harness's
overhead.

Two tiers, which agree document by document:

* **one**: requests are built once in a worker, their tokens frozen
  (:mod:`mergesearch.evaluators.harness.scoring`); every trial scores them, hands the answers to the
  task's own filters and asks its ``process_results`` for each document. Generation runs through the
  harness's own model class on the frozen requests.
* **two**: ``lm_eval.evaluate`` on the kept task objects, for tasks whose requests depend on
  answers.

Every document is an item, its task is its domain, and directions are those that tasks declare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import (
    SPLITS,
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)
from mergesearch.evaluators.harness.scoring import (
    Answer,
    Options,
    Request,
    can_pack,
    score_requests,
)
from mergesearch.evaluators.harness.tasks import (
    SplitTask,
    TaskOptions,
    aggregate,
    check_disjoint,
    check_metric,
    item_score,
    load_split,
    quiet,
    refuse_public,
)
from mergesearch.evaluators.items import balanced_order, chosen_places
from mergesearch.evaluators.objectives import (
    DomainScore,
    Metric,
    additive_of,
    check_metrics,
    constraints_of,
    measure,
    needed_references,
    objectives_of,
)
from mergesearch.evaluators.text.tokenizers import load_tokenizer, parent_warnings
from mergesearch.merging import InputError, MergesearchError

if TYPE_CHECKING:
    from mergesearch.evaluators.harness.harness_model import HarnessModel

#: Request types whose answers are log-likelihoods of frozen tokens.
SCORED = ("loglikelihood", "loglikelihood_rolling")
#: Requests of each kind of task that packing is tried on.
TRIED = 24


@dataclass(frozen=True)
class Prompt:
    """How prompts are made: the same for base, experts and merges.

    Attributes:
        apply_chat_template: Whether, or by the name of which template.
        system_prompt: Said first.
        fewshot_as_multiturn: Examples as turns of a conversation.
    """

    apply_chat_template: bool | str = False
    system_prompt: str | None = None
    fewshot_as_multiturn: bool = False


@dataclass(frozen=True, eq=False)
class Frozen:
    """A task's requests on a split, ready to be scored.

    Attributes:
        source: The task.
        documents: Every document ``(documents,)``.
        instances: The requests of each document, in the task's order.
        tokens: Instance -> what it is scored on; nothing for instances that generate.
    """

    source: SplitTask
    documents: tuple[Any, ...]
    instances: tuple[tuple[Any, ...], ...]
    tokens: Mapping[int, tuple[Request, ...]]


@dataclass(eq=False)
class Ready:
    """What a worker keeps of a split once it has a model."""

    frozen: list[Frozen] = field(default_factory=list)
    packed: bool = False


class LmEval:
    """Scores a causal language model on tasks of lm_eval.

    Args:
        tasks: The tasks.
        metrics: Objectives and bounds; ``metric`` "" means every task's default.
        tokenizer: Folder of the tokenizer that all models share.
        include_path: Folder of more task files.
        batch_size: Rows of a forward pass.
        max_length: Tokens that the model reads; None: as its configuration says.
        packed: Let the choices of a document share a row: True, False, or None to try whether the
            model allows it.
        padding: Side on which rows are filled up.
        prompt: How prompts are made.
        max_items: Search on so many of the search documents only.
        experts: Task -> its expert, where that has another name.
        allow_public: Allow public benchmarks as targets of the search.
        where: Key of the study file, for messages.
    """

    transductive = False
    selects = True
    model_class: str | None = "AutoModelForCausalLM"
    provides = frozenset({"items"})
    differentiable: tuple[str, ...] = ()

    def __init__(
        self,
        tasks: Sequence[TaskOptions],
        metrics: Sequence[Metric],
        *,
        tokenizer: str | None,
        include_path: Path | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
        packed: bool | None = None,
        padding: Literal["right", "left"] = "right",
        prompt: Prompt | None = None,
        max_items: int | None = None,
        experts: Mapping[str, str] | None = None,
        allow_public: bool = False,
        where: str,
    ) -> None:
        self._options = tuple(tasks)
        self._given = tuple(metrics)
        self._where = where
        self._tokenizer = tokenizer
        self._include = None if include_path is None else str(include_path)
        self._batch_size = batch_size
        self._max_length = max_length
        self._packed = packed
        self._padding = padding
        self._prompt = prompt or Prompt()
        self._max_items = max_items
        self._experts = dict(experts or {})
        self._allow_public = allow_public
        self._model: HarnessModel | None = None
        self._ready: dict[Split, Ready] = {}

    # --- what is declared
    # ------------------------------------------------------------------------

    @cached_property
    def _tasks(self) -> dict[Split, list[SplitTask]]:
        """Every task on every split."""
        for place, options in enumerate(self._options):
            if not self._allow_public:
                refuse_public(options, self._include, f"{self._where}.tasks.{place}")
        tasks = {
            split: [
                task
                for place, options in enumerate(self._options)
                for task in load_split(
                    options, self._include, split, f"{self._where}.tasks.{place}"
                )
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
    def _metrics(self) -> tuple[Metric, ...]:
        """Objectives and bounds with their metric and direction as the tasks have them."""
        resolved = tuple(self._resolved(metric) for metric in self._given)
        check_metrics(resolved, self._where, by_domain=True)
        return resolved

    def _resolved(self, metric: Metric) -> Metric:
        from dataclasses import replace

        known = {task.name: task for task in self._tasks["search"]}
        odd = sorted(set(metric.domains or ()) - known.keys())
        if odd:
            raise InputError(
                f"{self._where}.objectives: expected domains among the tasks {sorted(known)}, "
                f"received {odd[0]!r}"
            )
        chosen = [known[name] for name in metric.domains or known]
        for task in chosen:
            check_metric(task, metric.metric or task.metric, f"{self._where}.objectives")
        names = {metric.metric or task.metric for task in chosen}
        ways = {task.direction(metric.metric or task.metric) for task in chosen}
        if len(ways) > 1 and metric.direction is None:
            by_task = {task.name: task.direction(metric.metric or task.metric) for task in chosen}
            raise InputError(
                f"{self._where}.objectives: expected tasks that are all maximised or all "
                f"minimised, received {by_task}; state them apart"
            )
        direction = metric.direction or ways.pop()
        name = names.pop() if len(names) == 1 else "score"
        return replace(metric, metric=name, direction=direction)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Names and directions, as the tasks declare them."""
        return objectives_of(self._metrics)

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of the bounds."""
        return constraints_of(self._metrics)

    @cached_property
    def additive(self) -> tuple[str, ...]:
        """Means of metrics that are means over documents."""
        plain = {
            m.label
            for m in self._metrics
            if all(_is_mean(t, self._metric_of(m, t)) for t in self._tasks_of(m))
        }
        return tuple(name for name in additive_of(self._metrics) if name in plain)

    def _tasks_of(self, metric: Metric) -> list[SplitTask]:
        return [
            task
            for task in self._tasks["search"]
            if metric.domains is None or task.name in metric.domains
        ]

    @staticmethod
    def _metric_of(metric: Metric, task: SplitTask) -> str:
        return task.metric if metric.metric == "score" else metric.metric

    def check(self) -> None:
        """Load tasks and documents; refuse what does not fit together, before any weight is read.

        Raises:
            InputError: In one line.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._where}.tokenizer: required key is missing: a study without a base has none"
            )
        check_disjoint(self._tasks, self._where)
        assert self._metrics
        load_tokenizer(self._tokenizer, f"{self._where}.tokenizer")

    def references(self) -> frozenset[str]:
        """Anchors that objectives are relative to."""
        return needed_references(
            self._metrics, [task.name for task in self._tasks["search"]], self._experts
        )

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Tokenizers and chat templates that differ among base and experts."""
        return parent_warnings(sources, templates=bool(self._prompt.apply_chat_template))

    def open(self) -> None:
        """Load tasks; requests are built with the first model."""
        self.check()

    def size(self, split: Split) -> int:
        """Documents of all tasks, as far as they are used."""
        return len(self._kept(split))

    def cost(self, split: Split, items: int | None = None) -> int:
        """One evaluation for each document."""
        return self.size(split) if items is None else min(items, self.size(split))

    def _domains(self, split: Split) -> npt.NDArray[np.str_]:
        """Task of every document of a split ``(all,)``."""
        return np.array([task.name for task in self._tasks[split] for _ in task.places])

    def _kept(self, split: Split) -> npt.NDArray[np.intp]:
        """Places of the documents that are used ``(items,)``."""
        order = balanced_order(self._domains(split))
        return np.sort(order[: self._max_items] if split == "search" else order)

    # --- measuring
    # ------------------------------------------------------------------------

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Scores of every task on the documents of a split.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
            InputError: If a metric has no score for single documents.
        """
        kept = self._kept(split)
        domains = self._domains(split)[kept]
        places = chosen_places(domains, items)
        raw = self._answers(candidate, split, kept[places])
        by_task = {
            str(name): np.flatnonzero(domains[places] == name)
            for name in np.unique(domains[places])
        }
        scores: dict[str, dict[str, DomainScore]] = {}
        for metric in self._metrics:
            for task in self._tasks_of(metric):
                rows = by_task.get(task.name)
                if rows is not None:
                    values = [raw[int(kept[place])] for place in places[rows]]
                    found = self._domain_score(
                        task, self._metric_of(metric, task), values, places[rows]
                    )
                    scores.setdefault(metric.metric, {})[task.name] = found
        return measure(self._metrics, scores, candidate.references, self._experts, domains)

    def _domain_score(
        self,
        task: SplitTask,
        metric: str,
        values: Sequence[Mapping[str, Any]],
        places: npt.NDArray[np.intp],
    ) -> DomainScore:
        given = [value[metric] for value in values if metric in value]
        if len(given) < len(values):
            raise InputError(
                f"{self._where}: {task.name}: expected {metric!r} of every document, received it "
                f"for {len(given)} of "
                f"{len(values)}: {sorted({key for value in values for key in value})} are measured"
            )
        value, error, mean = aggregate(task.task, metric, given)
        if mean:
            items = np.array([float(one) for one in given])
        else:
            items = np.array([item_score(one, task, metric, self._where) for one in given])
        return DomainScore(value, error, items, places, mean)

    def _answers(
        self, candidate: Candidate, split: Split, places: npt.NDArray[np.intp]
    ) -> dict[int, dict[str, Any]]:
        """Place of a document among all of the split -> metric -> what it scored there."""
        known: dict[int, dict[str, Any]] = candidate.scored.setdefault((id(self), split), {})
        fresh = [place for place in places.tolist() if place not in known]
        if fresh:
            ready = self._prepare(candidate.model, split)
            first = 0
            for place, source in enumerate(self._tasks[split]):
                own = [p - first for p in fresh if first <= p < first + len(source.places)]
                if own:
                    found = (
                        self._by_harness(source, own)
                        if self._second_tier(source)
                        else self._by_frozen(
                            candidate.model, ready.frozen[place], own, ready.packed
                        )
                    )
                    known.update(
                        {
                            first + document: metrics
                            for document, metrics in zip(own, found, strict=True)
                        }
                    )
                first += len(source.places)
        return known

    def _second_tier(self, source: SplitTask) -> bool:
        tier = source.options.tier
        return tier == "two" or (tier == "auto" and source.task.OUTPUT_TYPE not in FIRST_TIER)

    def _harness(self, model: Any) -> HarnessModel:
        """The harness's view of the resident model."""
        from mergesearch.evaluators.harness.harness_model import bind

        if self._model is None or self._model.model is not model:
            assert self._tokenizer is not None
            tokenizer = load_tokenizer(self._tokenizer, f"{self._where}.tokenizer")
            self._model = bind(model, tokenizer, self._batch_size, self._max_length)
        return self._model

    def _prepare(self, model: Any, split: Split) -> Ready:
        """Requests and tokens of a split, built when it is first used."""
        harness = self._harness(model)
        if split not in self._ready:
            frozen = [
                Frozen(task, (), (), {}) if self._second_tier(task) else self._freeze(harness, task)
                for task in self._tasks[split]
            ]
            self._ready[split] = Ready(frozen, self._packs(model, harness, frozen))
        return self._ready[split]

    def _freeze(self, harness: HarnessModel, source: SplitTask) -> Frozen:
        """Build a task's requests, and look at their tokens."""
        task = source.task
        asked = self._building(harness)
        with quiet():
            task.build_all_requests(samples=list(source.places), **asked)
        by_document: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        documents = [doc for _, doc in task.doc_iterator(samples=list(source.places))]
        groups = tuple(
            tuple(sorted(by_document[i], key=lambda one: one.idx)) for i in range(len(documents))
        )
        scored = [one for group in groups for one in group if one.request_type in SCORED]
        with quiet():
            tokens = {id(one): harness.tokens_of(one) for one in scored}
        return Frozen(source, tuple(documents), groups, tokens)

    def _building(self, harness: HarnessModel) -> dict[str, Any]:
        """What requests are built with."""
        asked = self._prompt.apply_chat_template
        if asked:
            harness.choose_template(asked)
        return {
            "system_instruction": self._prompt.system_prompt,
            "apply_chat_template": bool(asked),
            "fewshot_as_multiturn": self._prompt.fewshot_as_multiturn,
            "chat_template": harness.apply_chat_template if asked else None,
            "tokenizer_name": harness.tokenizer_name if asked else "",
        }

    def _packs(self, model: Any, harness: HarnessModel, frozen: Sequence[Frozen]) -> bool:
        """Whether choices share rows: as told, or as the model turns out to allow."""
        if self._packed is not None:
            return self._packed
        tried = [tokens for task in frozen for tokens in list(task.tokens.values())[:TRIED]]
        requests = [request for tokens in tried for request in tokens]
        return bool(requests) and can_pack(model, requests, self._scoring(harness, False))

    def _scoring(self, harness: HarnessModel, packed: bool) -> Options:
        return Options(self._batch_size, harness.max_length, packed, self._padding)

    def _by_frozen(
        self, model: Any, frozen: Frozen, documents: Sequence[int], packed: bool
    ) -> list[dict[str, Any]]:
        """The first tier: metrics of some documents."""
        harness = self._harness(model)
        instances = [one for document in documents for one in frozen.instances[document]]
        for one in instances:
            one.resps = []
            one.filtered_resps = {}
        scored = [one for one in instances if id(one) in frozen.tokens]
        requests = [request for one in scored for request in frozen.tokens[id(one)]]
        answers = iter(score_requests(model, requests, self._scoring(harness, packed)))
        for one in scored:
            parts = [next(answers) for _ in frozen.tokens[id(one)]]
            one.resps = [_answer(one.request_type, parts)] * one.repeats
        harness.generate([one for one in instances if id(one) not in frozen.tokens])
        task = frozen.source.task
        chosen = frozen.source.filter
        for ensemble in getattr(task, "_filters", []):
            if ensemble.name == chosen:
                ensemble.apply(instances)
        return [
            self._processed(
                frozen, document, [one.filtered_resps[chosen] for one in frozen.instances[document]]
            )
            for document in documents
        ]

    def _processed(self, frozen: Frozen, document: int, responses: list[Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = frozen.source.task.process_results(
                frozen.documents[document], responses
            )
        except Exception as error:
            raise MergesearchError(
                f"{frozen.source.name}: expected scores of document {frozen.source.ids[document]}, "
                "received "
                f"{type(error).__name__}: {error}"
            ) from error
        return found

    def _by_harness(self, source: SplitTask, documents: Sequence[int]) -> list[dict[str, Any]]:
        """The second tier: the harness evaluates its own task object on some documents."""
        import lm_eval

        assert self._model is not None
        places = [source.places[document] for document in documents]
        asked = self._building(self._model)
        name = source.task.task_name
        with quiet():
            results = lm_eval.evaluate(
                lm=self._model.lm,
                task_dict={"tasks": {name: source.task}, "groups": {}, "group_map": {}},
                samples={name: places},
                bootstrap_iters=0,
                **{
                    key: asked[key]
                    for key in ("system_instruction", "apply_chat_template", "fewshot_as_multiturn")
                },
            )
        by_place = {
            entry["doc_id"]: entry
            for entry in results["samples"][name]
            if entry["filter"] == source.filter
        }
        return [
            {metric: by_place[place][metric] for metric in by_place[place]["metrics"]}
            for place in places
        ]

    # --- no gradients
    # ------------------------------------------------------------------------

    def batch_cost(self, batch: Batch) -> int:
        """Nothing: there are no gradients."""
        return 0

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Refused: metrics of tasks are not differentiable.

        Raises:
            MergesearchError: Always.
        """
        raise MergesearchError(
            f"{self._where}: expected no gradients of lm_eval's metrics, received a request for "
            "some"
        )


#: Output types whose requests are known before any answer.
FIRST_TIER = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")


def _answer(kind: str, parts: Sequence[Answer]) -> Any:
    """What the harness hands to a filter: both numbers, or the sum over the windows of a text."""
    return sum(value for value, _ in parts) if kind == "loglikelihood_rolling" else parts[0]


def _is_mean(task: SplitTask, metric: str) -> bool:
    """Whether a task's value is the mean of its documents' scores."""
    function = task.task.aggregation()[metric]
    return bool(getattr(function, "__name__", "") in ("mean", "nanmean"))
