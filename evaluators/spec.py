"""The ``evaluators:`` section of a study file, and the evaluator that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, field_validator, model_validator
from pydantic import Field as Key

from evaluators.base import Evaluator
from evaluators.composite import Composite

if TYPE_CHECKING:
    from evaluators.objectives import Metric

Share = Annotated[float, Key(ge=0, le=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FaultsSpec(_Spec):
    """Shares of all recipes that fail, for trying out a cluster."""

    nan: Share = Key(default=0.0, description="The losses are NaN.")
    error: Share = Key(default=0.0, description="The evaluation raises.")
    kill: Share = Key(default=0.0, description="The evaluating process kills itself with SIGKILL.")


class SyntheticSpec(_Spec):
    """An analytic problem; no model, no data."""

    kind: Literal["synthetic"]
    problem: Literal["sphere", "ellipsoid", "quadratic_tasks", "zdt1"]
    objectives: int | None = Key(default=None, ge=1, description="Number of losses, for quadratic_tasks.")
    seed: int = Key(default=0, ge=0, description="Seed of optima, rotations and noise.")
    noise: float = Key(default=0.0, ge=0, description="Standard deviation of the measured losses.")
    items: int = Key(default=0, ge=0, description="Items per split; gives item scores and standard errors.")
    seconds: float = Key(default=0.0, ge=0, description="How long an evaluation takes.")
    faults: FaultsSpec = FaultsSpec()

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.synthetic import Faults, Synthetic

        options = self.model_dump(exclude={"kind", "faults"})
        return Synthetic(**options, faults=Faults(**self.faults.model_dump()), where=where)


class ScoreSpec(_Spec):
    """One objective of an evaluator with a single metric."""

    name: str | None = Key(default=None, min_length=1, description="Name; by default made from the rest.")
    domains: list[str] | None = Key(default=None, min_length=1, description="Domains to measure on; by default all.")
    reduce: Literal["mean", "worst", "geometric_mean"] = Key(
        default="mean", description="How several domains become one value."
    )
    normalise: Literal["expert", "base", "chance", "forgetting"] | None = Key(
        default=None, description="Compare each domain with its expert, the base (retention), a guess, or what is lost."
    )
    chance: float | dict[str, float] = Key(default=0.0, description="What a guess scores, in all domains or by domain.")


class BoundSpec(ScoreSpec):
    """A bound that merges must keep: those that miss it rank behind all that keep it, and never win."""

    at_least: float | Literal["base"] | None = Key(default=None, description="A number, or base: what the base scores.")
    at_most: float | Literal["base"] | None = Key(default=None, description="A number, or base: what the base scores.")
    tolerance: float = Key(default=0.0, ge=0, description="How far it may be missed.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("expected at_least or at_most")
        return self


class MetricSpec(ScoreSpec):
    """One objective of a classification evaluator."""

    metric: Literal["accuracy", "cross_entropy"] = "accuracy"


class MetricBoundSpec(BoundSpec, MetricSpec):
    """One bound of a classification evaluator."""


def metrics_of(scores: Sequence[ScoreSpec], metric: str | None = None) -> list[Metric]:
    """Objectives and bounds as evaluators take them."""
    from evaluators.objectives import Metric

    named: dict[str, Any] = {} if metric is None else {"metric": metric}
    return [Metric(**named, **score.model_dump()) for score in scores]


class ClassificationSpec(_Spec):
    """Image classification on a ``datasets`` folder."""

    kind: Literal["classification"]
    data: str = Key(description="Folder written by DatasetDict.save_to_disk.")
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict, description="Names of the three splits in the folder, where they differ."
    )
    input: str = Key(default="pixels", description="Column of the images.")
    label: str = Key(default="label", description="Column of the class numbers.")
    domain: str | None = Key(default=None, description="Column that says which domain an item belongs to.")
    id: str | None = Key(default=None, description="Column of stable ids; by default a hash of the image.")
    batch_size: int = Key(default=256, ge=1)
    max_items: int | None = Key(default=None, ge=1, description="Search on so many of the search items only.")
    objectives: list[MetricSpec] = Key(default_factory=lambda: [MetricSpec()], min_length=1)
    constraints: list[MetricBoundSpec] = Key(default_factory=list, description="Bounds that merges must keep.")
    experts: dict[str, str] | None = Key(default=None, description="Domain -> expert; by default of the same name.")

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.classification import Classification

        return Classification(**_as_classification(self, folder, where))


class T3Spec(ClassificationSpec):
    """Image classification by base and one expert, merged for each input by how much they disagree."""

    kind: Literal["t3"]  # type: ignore[assignment]
    per: Literal["item", "batch"] = Key(default="item", description="Merge for every item, or once for a batch.")
    centred: bool = Key(default=False, description="2 sigmoid - 1 in the place of the published sigmoid.")

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.t3 import T3

        return T3(per=self.per, centred=self.centred, **_as_classification(self, folder, where))


class TwinMergingSpec(ClassificationSpec):
    """Image classification by a shared merge and low-rank vectors of the experts, weighted by a router."""

    kind: Literal["twin_merging"]  # type: ignore[assignment]
    per: Literal["item", "batch"] = Key(default="item", description="Merge for every item, or once for a batch.")
    router_width: int = Key(default=64, ge=1, description="Hidden width of the router.")
    router_steps: int = Key(default=100, ge=1, le=10000, description="Training steps, on all search items at once.")
    router_seed: int = Key(default=0, ge=0, description="Seed of the router's first weights.")

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.twin_merging import TwinMerging

        own = self.model_dump(include={"per", "router_width", "router_steps", "router_seed"})
        return TwinMerging(**own, **_as_classification(self, folder, where))


def _as_classification(spec: ClassificationSpec, folder: Path, where: str) -> dict[str, Any]:
    """What evaluators that score as a classifier hand on."""
    return {
        "data": folder / spec.data,
        "metrics": metrics_of([*spec.objectives, *spec.constraints]),
        "splits": spec.splits,
        "columns": {"input": spec.input, "label": spec.label, "domain": spec.domain, "id": spec.id},
        "batch_size": spec.batch_size,
        "max_items": spec.max_items,
        "experts": spec.experts,
        "where": where,
    }


class _ItemSpec(_Spec):
    """Items of a ``datasets`` folder that a model is run on."""

    data: str = Key(description="Folder written by DatasetDict.save_to_disk.")
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict, description="Names of the three splits in the folder, where they differ."
    )
    domain: str | None = Key(default=None, description="Column that says which domain an item belongs to.")
    id: str | None = Key(default=None, description="Column of stable ids; by default a hash of the first input.")
    batch_size: int = Key(default=256, ge=1)
    max_items: int | None = Key(default=None, ge=1, description="Search on so many of the search items only.")
    objectives: list[ScoreSpec] = Key(default_factory=lambda: [ScoreSpec()], min_length=1)
    constraints: list[BoundSpec] = Key(default_factory=list, description="Bounds that merges must keep.")
    experts: dict[str, str] | None = Key(default=None, description="Domain -> expert; by default of the same name.")

    def _options(self, folder: Path, where: str, metric: str, inputs: Mapping[str, str]) -> dict[str, Any]:
        """What every evaluator of items is built from."""
        return {
            "data": folder / self.data,
            "metrics": metrics_of([*self.objectives, *self.constraints], metric),
            "splits": self.splits,
            "columns": {**inputs, "label": None, "domain": self.domain, "id": self.id},
            "batch_size": self.batch_size,
            "max_items": self.max_items,
            "experts": self.experts,
            "where": where,
        }


class _UnlabelledSpec(_ItemSpec):
    model_class: str = Key(
        default="AutoModelForImageClassification", description="transformers auto class of the model."
    )
    inputs: dict[str, str] = Key(
        default_factory=lambda: {"pixel_values": "pixels"}, min_length=1, description="Argument of the model -> column."
    )

    @field_validator("inputs")
    @classmethod
    def _no_roles(cls, inputs: dict[str, str]) -> dict[str, str]:
        from evaluators.model_items import ROLES

        odd = sorted(set(inputs) & set(ROLES))
        if odd:
            raise ValueError(f"expected arguments of a model but {', '.join(ROLES)}, received {odd[0]}")
        return inputs

    transductive: bool = Key(
        default=False, description="Search on the test items themselves, without their labels, as some papers do."
    )


class EntropySpec(_UnlabelledSpec):
    """How sure the model is of its answers, on items without labels."""

    kind: Literal["entropy"]

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.entropy import Entropy

        options = self._options(folder, where, "entropy", self.inputs)
        return Entropy(self.model_class, transductive=self.transductive, **options)


class AlignmentSpec(_UnlabelledSpec):
    """How far the model's answers are from those of the expert of each domain, on items without labels."""

    kind: Literal["alignment"]
    teachers: dict[str, str] | None = Key(
        default=None,
        description="Domain -> expert of the study, or path of a checkpoint; by default the expert of the same name.",
    )
    temperature: float = Key(default=1.0, gt=0, description="Of the answers that are compared.")
    hidden_weight: float = Key(default=1.0, ge=0, description="Weight of the difference of hidden states.")
    layers: list[int] = Key(
        default_factory=list, description="Hidden states to compare, 0 the embeddings; by default none."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.alignment import Alignment
        from merging.checkpoint import absolute_path

        own = self.model_dump(include={"temperature", "hidden_weight", "layers", "transductive"})
        options = self._options(folder, where, "alignment", self.inputs)
        teachers = {domain: absolute_path(path, folder) for domain, path in (self.teachers or {}).items()}
        return Alignment(self.model_class, teachers, **own, **options)


class LanguageModelSpec(_ItemSpec):
    """Next-token cross-entropy of a causal language model on token ids."""

    kind: Literal["language_model"]
    input: str = Key(default="input_ids", description="Column of token ids.")
    labels: str | None = Key(
        default=None, description="Column of the ids to predict, -100 where a token does not count; by default all do."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.language_model import LanguageModel

        inputs = {"input_ids": self.input} | ({} if self.labels is None else {"labels": self.labels})
        return LanguageModel(**self._options(folder, where, "cross_entropy", inputs))


class TaskSpec(_Spec):
    """One task of lm_eval."""

    task: str | dict[Literal["search", "validation", "test"], str] = Key(
        description="Name of a task or group, or one for each split."
    )
    name: str | None = Key(default=None, min_length=1, description="What to call it; by default the task's name.")
    metric: str | None = Key(default=None, description="Default metric; by default the task's first.")
    filter: str | None = Key(default=None, description="Which of the task's filters; required where it has several.")
    num_fewshot: int | None = Key(default=None, ge=0, description="Examples before the question.")
    fewshot_seed: int = Key(default=1234, ge=0, description="Seed of the choice of examples.")
    gen_kwargs: dict[str, Any] = Key(default_factory=dict, description="Changes to the generation arguments.")
    splits: dict[Literal["search", "validation", "test"], str] | None = Key(
        default=None, description="Names of the three splits in the task's dataset."
    )
    samples: dict[Literal["search", "validation", "test"], list[int]] | None = Key(
        default=None, description="Places of the documents of each split among those that lm_eval evaluates."
    )
    divide: tuple[float, float, float] = Key(
        default=(0.6, 0.2, 0.2), description="Shares of the splits where neither is given, divided by a hash."
    )
    limit: int | dict[Literal["search", "validation", "test"], int] | None = Key(
        default=None, description="Documents of a split at most."
    )
    tier: Literal["auto", "one", "two"] = Key(
        default="auto", description="one: frozen requests; two: lm_eval's own loop; auto: one where it can serve."
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key in ("task", "splits", "samples"):
            given = getattr(self, key)
            if isinstance(given, dict) and set(given) != {"search", "validation", "test"}:
                raise ValueError(f"{key}: expected search, validation and test, received {sorted(given)}")
        if self.splits is not None and self.samples is not None:
            raise ValueError("expected splits or samples, received both")
        if min(self.divide) <= 0:
            raise ValueError(f"divide: expected three positive shares, received {list(self.divide)}")
        return self


def _task(value: Any) -> Any:
    """Allow a bare name."""
    return {"task": value} if isinstance(value, str) else value


class TaskMetricSpec(ScoreSpec):
    """One objective over tasks, whose names are the domains."""

    metric: str | None = Key(default=None, description="A metric of the tasks; by default each task's own.")
    direction: Literal["maximize", "minimize"] | None = Key(
        default=None, description="Where better is; by default as the tasks say."
    )


class TaskBoundSpec(BoundSpec, TaskMetricSpec):
    """One bound over tasks."""


class LmEvalSpec(_Spec):
    """Tasks of the language-model evaluation harness."""

    kind: Literal["lm_eval"]
    tasks: list[Annotated[TaskSpec, BeforeValidator(_task)]] = Key(min_length=1)
    include_path: str | None = Key(default=None, description="Folder of more task files.")
    tokenizer: str | None = Key(default=None, description="Folder of the tokenizer; by default the base's.")
    batch_size: int = Key(default=64, ge=1, description="Rows of a forward pass.")
    max_length: int | None = Key(default=None, ge=2, description="Tokens that the model reads; by default as it says.")
    packed: bool | Literal["auto"] = Key(
        default="auto", description="Let the choices of a document share a row; auto tries whether the model allows it."
    )
    padding: Literal["right", "left"] = Key(default="right", description="Side on which rows are filled up.")
    apply_chat_template: bool | str = Key(default=False, description="Whether, or by the name of which template.")
    system_prompt: str | None = Key(default=None, description="Said first.")
    fewshot_as_multiturn: bool = Key(default=False, description="Examples as turns of a conversation.")
    max_items: int | None = Key(default=None, ge=1, description="Search on so many of the search documents only.")
    objectives: list[TaskMetricSpec] = Key(default_factory=lambda: [TaskMetricSpec()], min_length=1)
    constraints: list[TaskBoundSpec] = Key(default_factory=list, description="Bounds that merges must keep.")
    experts: dict[str, str] | None = Key(default=None, description="Task -> expert; by default of the same name.")
    allow_public_benchmarks: bool = Key(
        default=False, description="Search on benchmarks that results are reported on all the same."
    )

    @property
    def runs_code(self) -> bool:
        """Whether task files name Python functions."""
        from evaluators.lm_tasks import names_code

        return self.include_path is not None and names_code(Path(self.include_path))

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.lm_harness import LmEval, Prompt
        from evaluators.lm_tasks import TaskOptions

        scores = [*self.objectives, *self.constraints]
        return LmEval(
            [TaskOptions(**task.model_dump()) for task in self.tasks],
            [replace(m, metric=score.metric or "") for m, score in zip(metrics_of(scores), scores, strict=True)],
            tokenizer=self.tokenizer,
            include_path=None if self.include_path is None else folder / self.include_path,
            batch_size=self.batch_size,
            max_length=self.max_length,
            packed=None if self.packed == "auto" else self.packed,
            padding=self.padding,
            prompt=Prompt(self.apply_chat_template, self.system_prompt, self.fewshot_as_multiturn),
            max_items=self.max_items,
            experts=self.experts,
            allow_public=self.allow_public_benchmarks,
            where=where,
        )


AnySpec = (
    SyntheticSpec
    | ClassificationSpec
    | EntropySpec
    | AlignmentSpec
    | LanguageModelSpec
    | LmEvalSpec
    | T3Spec
    | TwinMergingSpec
)
EvaluatorSpec = Annotated[AnySpec, Key(discriminator="kind")]

#: Kind -> one line, for listings.
EVALUATORS: Mapping[str, str] = {
    "alignment": "how far answers are from those of each domain's expert, without labels; gives gradients",
    "classification": "accuracy and cross-entropy of an image classifier on a datasets folder, by domain",
    "entropy": "how sure a model is of its answers, without labels; gives gradients",
    "language_model": "next-token cross-entropy of a causal language model on token ids; gives gradients",
    "lm_eval": "tasks of the language-model evaluation harness, local or its own, document by document",
    "synthetic": "analytic problems with known optima, no model; noise and faults for trying out a cluster",
    "t3": "base and one expert merged for each input by how much they disagree, as an image classifier",
    "twin_merging": "shared merge and low-rank vectors of experts, routed for each input, as an image classifier",
}


def parse_evaluators(section: Sequence[Mapping[str, Any]]) -> list[AnySpec]:
    """The section as specs, from the plain data of a resolved study."""
    return TypeAdapter(list[EvaluatorSpec]).validate_python(list(section))


def build_evaluator(specs: Sequence[AnySpec], folder: Path) -> Evaluator:
    """One evaluator for the whole section; relative paths start at ``folder``.

    Raises:
        InputError: If two objectives have the same name, or the parts do not fit together.
    """
    members = [spec.build(folder, f"evaluators.{place}") for place, spec in enumerate(specs)]
    return members[0] if len(members) == 1 else Composite(members)
