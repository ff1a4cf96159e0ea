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

    def _options(self, folder: Path, where: str, metric: str | None, inputs: Mapping[str, str]) -> dict[str, Any]:
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


class SegmentationMetricSpec(ScoreSpec):
    """One objective of a segmentation evaluator."""

    metric: Literal["dice", "iou", "cross_entropy"] = "dice"


class SegmentationBoundSpec(BoundSpec, SegmentationMetricSpec):
    """One bound of a segmentation evaluator."""


class SegmentationSpec(_ItemSpec):
    """Masks by a promptable model (SAM and its kin) or a semantic segmentation model."""

    kind: Literal["segmentation"]
    inputs: dict[str, str] = Key(
        default_factory=lambda: {"pixel_values": "pixels", "input_boxes": "boxes"},
        min_length=1,
        description="Argument of the model -> column.",
    )
    mask: str = Key(default="mask", description="Column of the masks: class numbers (height, width).")
    model_class: str | None = Key(
        default=None,
        description="transformers auto class; by default AutoModelForMaskGeneration where there are boxes, points or "
        "masks among the inputs, else AutoModelForSemanticSegmentation.",
    )
    background: int | None = Key(default=0, ge=0, description="Class number that does not count; null: all count.")
    ignored: int | None = Key(default=None, ge=0, description="Class number of pixels that count nowhere.")
    multimask: bool = Key(
        default=False, description="Let a promptable model propose several masks, and take what it expects most of."
    )
    batch_size: int = Key(default=32, ge=1)
    objectives: list[SegmentationMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [SegmentationMetricSpec()], min_length=1
    )
    constraints: list[SegmentationBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @field_validator("inputs")
    @classmethod
    def _no_roles(cls, inputs: dict[str, str]) -> dict[str, str]:
        odd = sorted(set(inputs) & {"mask", "label", "domain", "id"})
        if odd:
            raise ValueError(f"expected arguments of a model but mask, label, domain, id, received {odd[0]}")
        return inputs

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.ignored is not None and self.ignored == self.background:
            raise ValueError(f"expected ignored and background to differ, received {self.ignored} for both")
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.segmentation import Segmentation

        own = self.model_dump(include={"background", "ignored", "multimask"})
        return Segmentation(
            self.model_class, **own, **self._options(folder, where, None, self.inputs | {"mask": self.mask})
        )


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


def _words(value: Any) -> Any:
    """Allow a command line in one string; no shell reads it."""
    import shlex

    return shlex.split(value) if isinstance(value, str) else value


class ObjectiveSpec(_Spec):
    """One objective that a program measures."""

    name: str = Key(min_length=1)
    direction: Literal["maximize", "minimize"]


class CommandSpec(_Spec):
    """Objectives that another program measures: JSON in, JSON out, one process per trial."""

    kind: Literal["command"]
    command: Annotated[list[str], BeforeValidator(_words), Key(min_length=1)] = Key(
        description="Program and arguments, as a list or one string; no shell."
    )
    objectives: list[ObjectiveSpec] = Key(min_length=1)
    timeout: float = Key(default=600.0, gt=0, description="Seconds that it may take; then it is ended.")
    inputs: Any = Key(default=None, description="Anything; handed to the program as it is.")
    model: Literal["folder", "none"] = Key(
        default="folder", description="Save the merged model for the program, or hand over the recipe alone."
    )
    model_class: str | None = Key(
        default=None, description="transformers auto class of the model; by default AutoModelForCausalLM."
    )
    tokenizer: str | None = Key(
        default=None, description="Checkpoint whose tokenizer goes beside the model; by default the base."
    )
    sizes: dict[Literal["search", "validation", "test"], Annotated[int, Key(ge=1)]] | None = Key(
        default=None, description="Items of each split, where the program scores them one by one."
    )
    folder: str = Key(default=".", description="Where the program runs; paths with a slash start there.")

    @property
    def runs_code(self) -> bool:
        """Always: that is what it is for."""
        return True

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.model == "none" and self.model_class is not None:
            raise ValueError(f"model_class: expected null with model: none, received {self.model_class}")
        if self.sizes is not None and set(self.sizes) != {"search", "validation", "test"}:
            raise ValueError(f"sizes: expected search, validation and test, received {sorted(self.sizes)}")
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.base import Objective
        from evaluators.command import Command

        own = self.model_dump(include={"timeout", "inputs", "sizes", "tokenizer"})
        model_class = None if self.model == "none" else self.model_class or "AutoModelForCausalLM"
        objectives = [Objective(**objective.model_dump()) for objective in self.objectives]
        return Command(
            self.command, objectives, **own, model_class=model_class, folder=folder / self.folder, where=where
        )


class GenerationMetricSpec(ScoreSpec):
    """One objective of a generation evaluator."""

    metric: Literal["score", "tokens"] = "score"


class GenerationBoundSpec(BoundSpec, GenerationMetricSpec):
    """One bound of a generation evaluator."""


class GenerationSpec(_ItemSpec):
    """What a causal language model writes after prompts, judged by a function."""

    kind: Literal["generation"]
    prompt: str = Key(default="prompt", description="Column of the prompts.")
    target: str | None = Key(default=None, description="Column of what is expected; by default nothing is.")
    tokenizer: str | None = Key(default=None, description="Folder of the tokenizer; by default the base's.")
    scorer: str = Key(
        default="exact_match",
        description="exact_match, contains, prefix, or module:function, called with prediction, target, prompt.",
    )
    direction: Literal["maximize", "minimize"] = Key(
        default="maximize", description="Where a better score is; minimised scores are called loss."
    )
    max_new_tokens: int = Key(default=64, ge=1, description="Tokens of a prediction at most.")
    until: list[Annotated[str, Key(min_length=1)]] = Key(
        default_factory=list, description="Strings that end a prediction."
    )
    chat_template: bool = Key(default=False, description="Say the prompt as a user's turn of a conversation.")
    system_prompt: str | None = Key(default=None, description="Said before it; needs chat_template.")
    engine: Literal["transformers", "vllm"] = Key(
        default="transformers", description="Who generates; vllm starts from the tokenizer's folder, the base's."
    )
    batch_size: int = Key(default=32, ge=1)
    objectives: list[GenerationMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [GenerationMetricSpec()], min_length=1
    )
    constraints: list[GenerationBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @property
    def runs_code(self) -> bool:
        """Whether the scorer is a function of the user's."""
        return ":" in self.scorer

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from evaluators.generation import SCORERS

        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("system_prompt: expected chat_template: true beside it, received false")
        if ":" not in self.scorer and self.scorer not in SCORERS:
            raise ValueError(f"scorer: expected module:function or one of {sorted(SCORERS)}, received {self.scorer!r}")
        if self.scorer in SCORERS and self.target is None:
            raise ValueError(f"target: required key is missing: {self.scorer} compares with a column of targets")
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.generation import Generation

        keys = {"scorer", "max_new_tokens", "until", "chat_template", "system_prompt", "engine"}
        inputs = {"prompt": self.prompt} | ({} if self.target is None else {"target": self.target})
        options = self._options(folder, where, None, inputs)
        if self.direction == "minimize":
            options["metrics"] = [
                replace(m, metric={"score": "loss"}.get(m.metric, m.metric)) for m in options["metrics"]
            ]
        return Generation(self.tokenizer, **self.model_dump(include=keys), **options)


class PerplexityMetricSpec(ScoreSpec):
    """One objective of a perplexity evaluator."""

    metric: Literal["perplexity", "log_perplexity"] = Key(
        default="perplexity", description="Of all texts of a domain together, or the mean over texts of its logarithm."
    )


class PerplexityBoundSpec(BoundSpec, PerplexityMetricSpec):
    """One bound of a perplexity evaluator."""


class PerplexitySpec(_ItemSpec):
    """Perplexity of a causal language model on texts."""

    kind: Literal["perplexity"]
    text: str = Key(default="text", description="Column of the texts.")
    tokenizer: str | None = Key(default=None, description="Folder of the tokenizer; by default the base's.")
    max_length: int | None = Key(
        default=None, ge=1, description="Tokens of a window; by default as many as the model has room for."
    )
    stride: int | None = Key(
        default=None, ge=1, description="Tokens from one window to the next; by default windows do not overlap."
    )
    batch_size: int = Key(default=16, ge=1, description="Windows of a forward pass, and texts that share some.")
    objectives: list[PerplexityMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [PerplexityMetricSpec()], min_length=1
    )
    constraints: list[PerplexityBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.perplexity import Perplexity

        options = self._options(folder, where, None, {"text": self.text})
        return Perplexity(self.tokenizer, max_length=self.max_length, stride=self.stride, **options)


class DistanceSpec(_Spec):
    """How far a merge is from the base, without any item."""

    kind: Literal["distance"]
    name: str = Key(default="distance", min_length=1, description="Name of the objective.")
    model_class: str = Key(default="AutoModelForCausalLM", description="transformers auto class of the model.")

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.distance import Distance

        return Distance(self.name, self.model_class, where)


AnySpec = (
    SyntheticSpec
    | DistanceSpec
    | ClassificationSpec
    | EntropySpec
    | AlignmentSpec
    | LanguageModelSpec
    | LmEvalSpec
    | SegmentationSpec
    | CommandSpec
    | GenerationSpec
    | PerplexitySpec
    | T3Spec
    | TwinMergingSpec
)
EvaluatorSpec = Annotated[AnySpec, Key(discriminator="kind")]

#: Kind -> one line, for listings.
EVALUATORS: Mapping[str, str] = {
    "alignment": "how far answers are from those of each domain's expert, without labels; gives gradients",
    "classification": "accuracy and cross-entropy of an image classifier on a datasets folder, by domain",
    "command": "objectives that another program measures, JSON in and JSON out, one process per trial",
    "distance": "how far a merge is from the base, relative to its size; no items",
    "entropy": "how sure a model is of its answers, without labels; gives gradients",
    "generation": "what a causal language model writes after prompts, judged by a function or a built-in scorer",
    "language_model": "next-token cross-entropy of a causal language model on token ids; gives gradients",
    "lm_eval": "tasks of the language-model evaluation harness, local or its own, document by document",
    "perplexity": "logarithm of the perplexity of a causal language model on texts; gives gradients",
    "segmentation": "Dice, IoU and cross-entropy of masks by a promptable or semantic model, on a datasets folder",
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
