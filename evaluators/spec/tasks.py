"""The section of tasks of the language-model evaluation harness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic import Field as Key

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ScoreSpec, Section, metrics_of
from mergesearch.evaluators.spec.routing import DESCRIPTION, RoutingSpec, no_routing
from mergesearch.evaluators.spec.section import ModelSection


class TaskSpec(Section):
    """One task of lm_eval."""

    task: str | dict[Literal["search", "validation", "test"], str] = Key(
        description="Name of a task or group, or one for each split."
    )
    name: str | None = Key(
        default=None, min_length=1, description="What to call it; by default the task's name."
    )
    metric: str | None = Key(
        default=None, description="Default metric; by default the task's first."
    )
    filter: str | None = Key(
        default=None, description="Which of the task's filters; required where it has several."
    )
    num_fewshot: int | None = Key(default=None, ge=0, description="Examples before the question.")
    fewshot_seed: int = Key(default=1234, ge=0, description="Seed of the choice of examples.")
    gen_kwargs: dict[str, Any] = Key(
        default_factory=dict, description="Changes to the generation arguments."
    )
    splits: dict[Literal["search", "validation", "test"], str] | None = Key(
        default=None, description="Names of the three splits in the task's dataset."
    )
    samples: dict[Literal["search", "validation", "test"], list[int]] | None = Key(
        default=None,
        description="Indices of the documents of each split among those that lm_eval evaluates.",
    )
    divide: tuple[float, float, float] = Key(
        default=(0.6, 0.2, 0.2),
        description="Shares of the splits where neither is given, divided by a hash.",
    )
    limit: int | dict[Literal["search", "validation", "test"], int] | None = Key(
        default=None, description="Documents of a split at most."
    )
    tier: Literal["auto", "one", "two"] = Key(
        default="auto",
        description="one: frozen requests; two: lm_eval's own loop; auto: one where it can serve.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key in ("task", "splits", "samples"):
            given = getattr(self, key)
            if isinstance(given, dict) and set(given) != {"search", "validation", "test"}:
                raise ValueError(
                    f"{key}: expected search, validation and test, received {sorted(given)}"
                )
        if self.splits is not None and self.samples is not None:
            raise ValueError("expected splits or samples, received both")
        if min(self.divide) <= 0:
            raise ValueError(
                f"divide: expected three positive shares, received {list(self.divide)}"
            )
        return self


def _task(value: Any) -> Any:
    """Allow the bare name of a task instead of a section."""
    return {"task": value} if isinstance(value, str) else value


class TaskMetricSpec(ScoreSpec):
    """One objective over tasks, whose names are the domains."""

    metric: str | None = Key(
        default=None, description="A metric of the tasks; by default each task's own."
    )
    direction: Literal["maximize", "minimize"] | None = Key(
        default=None, description="Where better is; by default as the tasks say."
    )


class TaskBoundSpec(BoundSpec, TaskMetricSpec):
    """One bound over tasks."""


#: Keys that are arguments of the evaluator.
_AS_GIVEN = {
    "tokenizer",
    "batch_size",
    "batch_tokens",
    "max_length",
    "padding",
    "max_items",
    "experts",
}


class LmEvalSpec(ModelSection):
    """Tasks of the language-model evaluation harness."""

    kind: Literal["lm_eval"]
    tasks: list[Annotated[TaskSpec, BeforeValidator(_task)]] = Key(min_length=1)
    include_path: str | None = Key(default=None, description="Folder of more task files.")
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    batch_size: int = Key(default=64, ge=1, description="Rows of a forward pass at most.")
    batch_tokens: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of a forward pass at most, with padding; by default 32,768 on a GPU, "
        "and no limit on the CPU.",
    )
    max_length: int | None = Key(
        default=None, ge=2, description="Tokens that the model reads; by default as it says."
    )
    packed: bool | Literal["auto"] = Key(
        default="auto",
        description="Let the choices of a document share a row; auto tries whether the model "
        "allows it.",
    )
    padding: Literal["right", "left"] = Key(
        default="right", description="Side on which rows are filled up."
    )
    apply_chat_template: bool | str = Key(
        default=False, description="Whether, or by the name of which template."
    )
    system_prompt: str | None = Key(default=None, description="Said first.")
    fewshot_as_multiturn: bool = Key(
        default=False, description="Examples as turns of a conversation."
    )
    max_items: int | None = Key(
        default=None, ge=1, description="Search on so many of the search documents only."
    )
    objectives: list[TaskMetricSpec] = Key(default_factory=lambda: [TaskMetricSpec()])
    constraints: list[TaskBoundSpec] = Key(
        default_factory=list, description="Bounds that merges must keep."
    )
    experts: dict[str, str] | None = Key(
        default=None, description="Task -> expert; by default of the same name."
    )
    routing: RoutingSpec | None = Key(default=None, exclude_if=no_routing, description=DESCRIPTION)
    allow_public_benchmarks: bool = Key(
        default=False, description="Search on benchmarks that results are reported on all the same."
    )

    @property
    def runs_code(self) -> bool:
        """Whether task files name Python functions."""
        from mergesearch.evaluators.harness.task_files import names_code

        return self.include_path is not None and names_code(Path(self.include_path))

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.harness.evaluator import LmEval
        from mergesearch.evaluators.harness.prompt import Prompt
        from mergesearch.evaluators.harness.tasks import TaskOptions

        scores = [*self.objectives, *self.constraints]
        options: dict[str, Any] = {
            "tasks": [TaskOptions(**task.model_dump()) for task in self.tasks],
            "metrics": [
                replace(m, metric=score.metric or "")
                for m, score in zip(metrics_of(scores), scores, strict=True)
            ],
            "include_path": None if self.include_path is None else folder / self.include_path,
            "packed": None if self.packed == "auto" else self.packed,
            "prompt": Prompt(
                self.apply_chat_template, self.system_prompt, self.fewshot_as_multiturn
            ),
            "allow_public": self.allow_public_benchmarks,
            "where": where,
            **self.model_dump(include=_AS_GIVEN),
        }
        if self.routing is None:
            return LmEval(**options)
        from mergesearch.evaluators.routing.tasks import TASKS

        return TASKS[self.routing.method](**options, **self.routing.rules)
